"""`fedllm serve` and `fedllm chat` as processes."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
from pathlib import Path

import httpx
import openai
import pytest
from cli_world import environment, fails, spawn
from serving_worlds import QUESTION, write_adapters
from typer.testing import CliRunner

from fedllm.cli import app
from fedllm.cli.chat import read_turn

KEY = "k" * 24


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return write_adapters(tmp_path_factory.mktemp("adapters"), count=2)


def talk(source: str | Path, lines: str, *words: str) -> tuple[str, str]:
    """Talk to `fedllm chat` in this process; return what it said and its errors."""
    done = CliRunner().invoke(app, ["chat", str(source), *words], input=lines)
    assert done.exit_code == 0, done.output
    return done.stdout, done.stderr


# serve


@pytest.mark.slow
def test_a_server_answers_until_it_is_asked_to_stop_and_ends_what_it_has_begun(
    adapters: dict[str, Path], tmp_path: Path
) -> None:
    keys = tmp_path / "keys"
    keys.write_text(f"ann:{KEY}\n")
    process = spawn("serve", adapters["client-0"], "--port", "0", "--api-key-file", keys)
    assert process.stdout is not None
    assert process.stdout.readline() == "models: global, base\n"
    url = process.stdout.readline().removeprefix("ready: ").partition(" ")[0]
    assert httpx.get(f"{url}/models").status_code == 401
    found: list[str] = []
    begun = threading.Event()

    def listen() -> None:
        with openai.OpenAI(base_url=url, api_key=KEY, max_retries=0) as client:
            stream = client.completions.create(
                model="global", prompt="a", max_tokens=300, stream=True,
                logit_bias={"4": -100},
            )  # fmt: skip
            for chunk in stream:
                begun.set()
                found.append(chunk.choices[0].finish_reason or "")

    listener = threading.Thread(target=listen)
    listener.start()
    assert begun.wait(60)
    process.send_signal(signal.SIGTERM)
    listener.join(60)
    assert process.wait(60) == 0
    assert found[-1] == "length"  # the answer came to its own end
    assert "POST /v1/completions 200" in process.communicate()[1]
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{url}/models")


def test_a_public_address_without_keys_is_refused_before_anything_is_loaded() -> None:
    text = fails("serve", "no-such-model", "--host", "0.0.0.0")
    assert "--api-key-file" in text
    assert "--no-auth" in text


def test_a_bad_key_file_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("ann:short\n")
    assert "16 characters" in fails("serve", "builtin:tiny", "--api-key-file", file)


@pytest.mark.parametrize("command", ["chat", "serve"])
def test_a_model_that_is_not_there_is_told_before_anything_large_is_imported(command: str) -> None:
    code = f"""
import sys
sys.argv = ["fedllm", "{command}", "./nosuch"]
try:
    from fedllm.cli import main
    main()
finally:
    print(sorted({{"torch", "transformers", "uvicorn"}} & set(sys.modules)))
"""
    words = [sys.executable, "-W", "ignore", "-c", code]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "There is no folder './nosuch'" in done.stderr
    assert done.stdout == "[]\n"


def test_vllm_that_is_not_installed_is_named() -> None:
    assert "pip install vllm" in fails("serve", "builtin:tiny", "--engine", "vllm")


def test_an_adapter_without_a_name_is_refused() -> None:
    assert "NAME=DIR" in fails("serve", "builtin:tiny", "--adapter", "folder")


# chat


@pytest.mark.slow
def test_a_conversation_through_a_pipe(adapters: dict[str, Path]) -> None:
    lines = f"/adapter\n{QUESTION}\n/adapter base\n/reset\n{QUESTION}\n/adapters\n/exit\nnever\n"
    done = subprocess.run(
        [sys.executable, "-m", "fedllm", "chat", str(adapters["client-1"]), "--dtype", "float32"],
        input=lines,
        capture_output=True,
        text=True,
        check=False,
        env=environment(),
        timeout=120,
    )
    assert (done.returncode, done.stderr) == (0, "")
    said = done.stdout.splitlines()
    assert said[:2] == ["* global", "  base"]
    assert "base answers now" in said
    assert "Did you mean '/adapter'?" in said[-1]
    first, _ = talk(adapters["client-1"], QUESTION, "--dtype", "float32")
    plain, _ = talk("builtin:tiny", f'"""\n{QUESTION}\n"""\n', "--dtype", "float32")
    assert first in done.stdout
    assert plain in done.stdout
    assert first != plain


def test_a_system_prompt_changes_answers_and_an_error_ends_no_conversation() -> None:
    system = "Answer with one word."
    lines = f"{QUESTION}\n/system {system}\n{QUESTION}\n" + "x" * 3000 + "\nhello\n"
    said, errors = talk("builtin:tiny", lines, "--max-tokens", "8")
    assert "room for 512 tokens" in errors
    assert len(said.splitlines()) >= 4
    told, _ = talk("builtin:tiny", f"{QUESTION}\n", "--system", system, "--max-tokens", "8")
    assert told.strip() in said


def test_several_lines_are_one_turn() -> None:
    def reading(*lines: str) -> str | None:
        left = iter(lines)
        return read_turn(lambda prompt: next(left, None))

    assert reading("one") == "one"
    assert reading("one\\", "two\\", "three", "four") == "one\ntwo\nthree"
    assert reading('"""', "one", "", "two", '"""') == "one\n\ntwo"
    assert reading('"""one', 'two"""') == "one\ntwo"
    assert reading('"""one line"""') == "one line"
    assert reading() is None


def test_an_unknown_adapter_is_refused() -> None:
    assert "Did you mean 'base'?" in fails("chat", "builtin:tiny", "--model", "bse")
