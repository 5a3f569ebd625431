from tests.models.conftest import pack  # noqa: F401 a fixture
