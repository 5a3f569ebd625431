// The conversation: turns of a question and the answer of each model, and what is sent of them.

/** Return the messages of a request: system text, earlier turns as that side saw them, and the last question. */
export function messages(system, turns, side) {
  const found = system ? [{ role: "system", content: system }] : [];
  turns.forEach((turn, index) => {
    if (index === turns.length - 1) {
      found.push(question(turn));
      return;
    }
    const answer = turn.answers[side] ?? turn.answers[0];
    if (answer.state === "failed") return; // it would fail again
    found.push(question(turn), { role: "assistant", content: answer.text });
  });
  return found;
}

function question(turn) {
  const pictures = turn.pictures.map((picture) => ({ type: "image_url", image_url: { url: picture.data } }));
  if (!pictures.length) return { role: "user", content: turn.text };
  return { role: "user", content: turn.text ? [...pictures, { type: "text", text: turn.text }] : pictures };
}
