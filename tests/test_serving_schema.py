"""schemathesis looks for what the server's own description promises and it does not keep."""

from __future__ import annotations

from collections.abc import Iterator

import hypothesis
import pytest
import schemathesis
from schemathesis.specs.openapi.checks import positive_data_acceptance
from serving_worlds import LIMITS, live, say, write_speaker

from fedllm.serving.host import Host
from fedllm.serving.sources import Source

EXAMPLES = 25
KEY = "k" * 24
RULES = (
    "top_logprobs needs logprobs",
    "stream_options needs stream",
    "there is no token",
    "has room for",
    "must be a JSON object",
    "are no JSON Schema",
    "the chat template cannot write",
)
"""What a request may be refused for that no JSON Schema can say: fields that depend on others, on
the model's vocabulary or its room, and text that is JSON inside."""


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    model = write_speaker(tmp_path_factory.mktemp("model") / "model", "qwen2.5-tools")
    host = Host(Source(model), LIMITS)
    say(host, "it is so")  # a random model would write until there is no room
    with live(host, {"ann": KEY}) as found:
        yield found


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # schemathesis and what it brings warn of themselves
@pytest.mark.parametrize("mode", list(schemathesis.GenerationMode), ids=lambda mode: mode.value)
@pytest.mark.parametrize(
    "operation",
    [
        "POST /v1/chat/completions",
        "POST /v1/completions",
        "GET /v1/models",
        "GET /v1/models/{model}",
        "GET /health",
        "GET /metrics",
    ],
)
def test_the_description_holds(url: str, operation: str, mode: schemathesis.GenerationMode) -> None:
    own = {"Authorization": f"Bearer {KEY}"}
    schema = schemathesis.openapi.from_url(f"{url}/openapi.json", headers=own)
    (found,) = [o.ok() for o in schema.get_all_operations() if o.ok().label == operation]

    @hypothesis.given(case=found.as_strategy(generation_mode=mode))
    @hypothesis.settings(
        max_examples=EXAMPLES,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    def holds(case: schemathesis.Case) -> None:
        answer = case.call(headers=own, timeout=60)
        is_rule = answer.status_code == 400 and any(rule in answer.text for rule in RULES)
        skipped = [positive_data_acceptance] if is_rule else []
        case.validate_response(answer, excluded_checks=skipped)

    try:
        holds()
    except hypothesis.errors.Unsatisfiable:
        assert mode is schemathesis.GenerationMode.NEGATIVE  # nothing to get wrong
