from tinyllava_fast.pace import Pace


def test_a_line_is_due_at_most_every_so_often():
    now = [100.0]
    pace = Pace(wait_s=5, every_s=10, clock=lambda: now[0])
    said = []
    for _ in range(40):
        if pace.due():
            said.append(now[0])
        now[0] += 1
    assert said == [105, 115, 125, 135]
    assert pace.elapsed_s == 40
    assert pace.due(always=True) and not pace.due()
    now[0] += 10
    assert pace.due()


def test_the_first_line_is_due_at_once_without_a_wait():
    pace = Pace(clock=lambda: 1.0)
    assert pace.due() and not pace.due()
