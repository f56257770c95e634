"""From a configuration to command lines, environments and addresses, and what is refused."""

import json
import os
from pathlib import Path

import pytest

from clipo_megatron.cli import main as cli
from clipo_megatron.config.errors import ConfigError
from clipo_megatron.config.load import load
from clipo_megatron.config.schema import (
    MOST_TOP_K,
    DType,
    EngineKind,
    ModelConfig,
    RolloutConfig,
    RunConfig,
    ServeConfig,
)
from clipo_megatron.runtime.ports import is_loopback
from clipo_megatron.serving import serve as command
from clipo_megatron.serving.commands import ServerSlot, api_key, server_command, url

PYTHON = Path("envs/bin/python")
KEY = "s3cret-key"


def config(engine: str, **sections) -> RunConfig:
    sections = {"serve": ServeConfig(), **sections}
    return RunConfig(
        model=ModelConfig(path="models/m", dtype=DType.bf16),
        rollout=RolloutConfig(engine=EngineKind(engine)),
        **sections,
    )


def flags(words) -> dict[str, list[str]]:
    """The words after each flag."""
    found: dict[str, list[str]] = {}
    for word in words:
        if word.startswith("--"):
            found[word] = []
            last = found[word]
        elif found:
            last.append(word)
    return found


@pytest.fixture(autouse=True)
def no_threads_given(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)


def test_sglang_on_a_cpu():
    made = server_command(config("sglang"), ServerSlot(0, 4000), python=PYTHON)
    assert made.arguments[:3] == (str(PYTHON), "-m", "sglang_forked")
    found = flags(made.arguments)
    expected = {
        "--model-path": "models/m",
        "--host": "127.0.0.1",
        "--port": "4000",
        "--tp-size": "1",
        "--dtype": "bfloat16",
        "--device": "cpu",
        "--attention-backend": "torch_native",
        "--sampling-backend": "pytorch",
    }
    assert {name: found[name] for name in expected} == {name: [value] for name, value in expected.items()}
    assert found["--disable-overlap-schedule"] == found["--sleep-on-idle"] == []
    assert not {"--trust-remote-code", "--api-key", "--config", "--enable-memory-saver"} & set(found)
    assert made.environment["HF_HUB_OFFLINE"] == "1" and int(made.environment["OMP_NUM_THREADS"]) >= 1
    stand_ins = Path(made.environment["PYTHONPATH"])
    assert {"sgl_kernel", "torchvision"} <= {path.name for path in stand_ins.iterdir()}


def test_sglang_on_gpus():
    run = config("sglang", serve=ServeConfig(tp=2, dtype=DType.fp32))
    run.rollout.colocated = True
    made = server_command(run, ServerSlot(1, 4001, ("2", "3")), python=PYTHON)
    assert made.arguments[2] == "sglang.launch_server", "CUDA cannot be used in a forked process"
    found = flags(made.arguments)
    assert found["--tp-size"] == ["2"] and found["--dtype"] == ["float32"] and found["--enable-memory-saver"] == []
    assert not {"--device", "--attention-backend", "--mem-fraction-static", "--sleep-on-idle"} & set(found)
    assert "2,3" in made.environment.values() and made.environment["PYTHONPATH"] == ""
    assert found["--enable-fp32-lm-head"] == [], "logits in fp32, as the trainer's"
    run.sglang = {"enable_fp32_lm_head": False}
    assert "--enable-fp32-lm-head" not in server_command(run, ServerSlot(0, 1, ("0",)), python=PYTHON).arguments
    run.rollout.colocated = False
    assert "--enable-memory-saver" not in server_command(run, ServerSlot(0, 1, ("0",)), python=PYTHON).arguments


def test_vllm_on_a_cpu():
    run = config("vllm")
    run.data.max_prompt_tokens, run.rollout.max_new_tokens, run.eval.max_new_tokens = 100, 20, 50
    made = server_command(run, ServerSlot(1, 4001), python=PYTHON, key=KEY)
    assert made.arguments[:3] == (str(PYTHON), "-m", "vllm_forked")
    found = flags(made.arguments)
    assert found["--logprobs-mode"] == ["processed_logprobs"] and found["--max-model-len"] == ["150"]
    assert int(found["--max-logprobs"][0]) == 2 * MOST_TOP_K
    assert found["--enforce-eager"] == [] and "--enable-sleep-mode" not in found
    assert found["--seed"] == ["1"], "servers that draw alike would give the same samples"
    assert made.environment["VLLM_SERVER_DEV_MODE"] == "1" and made.environment["VLLM_API_KEY"] == KEY
    module, _, name = found["--worker-extension-cls"][0].rpartition(".")
    own, shared = map(Path, made.environment["PYTHONPATH"].split(os.pathsep))
    source = (own / f"{module}.py").read_text()
    assert f"class {name}:" in source and "import clipo_megatron" not in source
    assert "import clipo_megatron" not in (shared / "clipo_delta.py").read_text()


@pytest.mark.parametrize("devices", [(), ("0",)])
def test_sglang_gets_what_takes_changes_of_weights_only_where_changes_are_sent(devices):
    run = config("sglang")
    plain = server_command(run, ServerSlot(0, 1, devices), python=PYTHON)
    assert "--custom-weight-loader" not in flags(plain.arguments)
    run.rollout.sync.delta = True
    made = server_command(run, ServerSlot(0, 1, devices), python=PYTHON)
    module, _, name = flags(made.arguments)["--custom-weight-loader"][0].rpartition(".")
    folders = made.environment["PYTHONPATH"].split(os.pathsep)
    assert any(f"def {name}(" in file.read_text() for folder in folders for file in Path(folder).glob(f"{module}.py"))
    assert set(plain.environment["PYTHONPATH"].split(os.pathsep)) - {""} < set(folders)


def test_vllm_sleeps_only_when_colocated():
    run = config("vllm")
    run.rollout.colocated = True
    made = server_command(run, ServerSlot(0, 1, ("0",)), python=PYTHON)
    assert made.arguments[2] == "vllm.entrypoints.openai.api_server"
    assert "VLLM_ENABLE_V1_MULTIPROCESSING" not in made.environment
    found = flags(made.arguments)
    assert found["--enable-sleep-mode"] == [] and "--enforce-eager" not in found


def test_options_of_the_engine_pass_through_and_win():
    options = {
        "mem_fraction_static": 0.8,
        "enable-metrics": True,
        "sleep_on_idle": False,
        "max_total_tokens": None,
        "cuda_graph_bs": [1, 2, 4],
        "json_model_override_args": {"a": [1, {"b": True}]},
        "attention_backend": "triton",
    }
    found = flags(server_command(config("sglang", sglang=options), ServerSlot(0, 1), python=PYTHON).arguments)
    assert found["--mem-fraction-static"] == ["0.8"] and found["--enable-metrics"] == []
    assert "--sleep-on-idle" not in found and "--no-sleep-on-idle" not in found and "--max-total-tokens" not in found
    assert found["--cuda-graph-bs"] == ["1", "2", "4"] and found["--attention-backend"] == ["triton"]
    assert json.loads(found["--json-model-override-args"][0]) == options["json_model_override_args"]


def test_false_becomes_a_negated_flag_of_vllm():
    run = config("vllm", vllm={"enforce_eager": False, "enable_prefix_caching": False})
    found = flags(server_command(run, ServerSlot(0, 1), python=PYTHON).arguments)
    assert found["--no-enforce-eager"] == found["--no-enable-prefix-caching"] == [] and "--enforce-eager" not in found


@pytest.mark.parametrize(
    ("option", "place"),
    [("port", "serve.port"), ("tp-size", "serve.tp"), ("model_path", "model.path"), ("api_key", "variable")],
)
def test_options_that_other_settings_decide(option, place):
    with pytest.raises(ConfigError, match=rf"sglang.{option}: it is decided by .*{place}"):
        server_command(config("sglang", sglang={option: 1}), ServerSlot(0, 1), python=PYTHON)


def test_the_local_engine_has_no_server():
    with pytest.raises(ConfigError, match=r"rollout\.engine = local"):
        server_command(config("local"), ServerSlot(0, 1), python=PYTHON)


@pytest.mark.parametrize("engine", ["sglang", "vllm"])
def test_the_key_is_in_no_argument(engine, tmp_path):
    made = server_command(config(engine), ServerSlot(0, 1), python=PYTHON, key=KEY, scratch=tmp_path)
    assert KEY not in " ".join(made.arguments)
    if engine == "sglang":
        path, text = made.secret_file
        assert flags(made.arguments)["--config"] == [str(path)] and json.dumps(KEY) in text
        assert KEY not in made.environment.values()


def test_addresses():
    assert all(map(is_loopback, ("127.0.0.1", "127.9.9.9", "::1", "[::1]", "localhost")))
    assert not any(map(is_loopback, ("0.0.0.0", "10.0.0.7", "node7", "::", "localhost.example.org", "")))
    assert url("127.0.0.1", 5) == "http://127.0.0.1:5" and url("node7", 5) == "http://node7:5"
    assert url("::1", 5) == "http://[::1]:5"
    assert "0.0.0.0" not in url("0.0.0.0", 5), "that is no address to call"


def test_others_may_not_reach_a_server_without_a_key():
    run = config("sglang", serve=ServeConfig(host="0.0.0.0"))
    assert api_key(run, {"CLIPO_API_KEY": KEY}) == KEY
    for environment in ({}, {"CLIPO_API_KEY": ""}):
        with pytest.raises(ConfigError, match=r"serve.host = 0.0.0.0.*CLIPO_API_KEY.*serve.host=127.0.0.1"):
            api_key(run, environment)
    assert api_key(config("sglang"), {}) is None


@pytest.fixture
def run_file(tmp_path) -> str:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    file = tmp_path / "run.yaml"
    file.write_text(
        f"model: {{path: {tmp_path}/model}}\ntrain: {{output: {tmp_path}/out}}\nrollout: {{engine: sglang}}\n"
    )
    return str(file)


def test_check_prints_and_starts_nothing(run_file, capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("CLIPO_API_KEY", KEY)
    monkeypatch.setenv("CLIPO_ENVIRONMENTS", str(tmp_path / "none"))
    for engine in ("sglang", "vllm"):
        assert (
            cli.main(["serve", run_file, "--check", f"rollout.engine={engine}", "serve.servers=2", "serve.port=7000"])
            == 0
        )
        shown = capsys.readouterr().out
        assert "server 0, http://127.0.0.1:7000" in shown and "server 1, http://127.0.0.1:7001" in shown
        assert "to be set up" in shown and KEY not in shown
    assert not (tmp_path / "out").exists() and not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["rollout.engine=local"], "nothing to serve"),
        (["rollout.endpoints=['http://10.0.0.1:1']"], "servers that others run"),
        (["model.path=nowhere"], "no Hugging Face model folder"),
        (["serve.servers=0"], "serve.servers = 0"),
        (["serve.health_timeout_s=0"], "serve.health_timeout_s"),
        (["serve.host=0.0.0.0"], "CLIPO_API_KEY"),
        (["sglang.host=0.0.0.0"], "decided by serve.host"),
        (["serve.python=no/python"], "no/python is no program"),
    ],
)
def test_refusals(run_file, capsys, monkeypatch, words, part):
    monkeypatch.delenv("CLIPO_API_KEY", raising=False)
    assert cli.main(["serve", run_file, *words]) == 2
    assert part in capsys.readouterr().err


def test_more_gpus_than_there_are(run_file, monkeypatch):
    run = load(run_file, ["serve.servers=3", "serve.tp=2"])
    with pytest.raises(ConfigError, match=r"3 x 2 = 6 GPUs, and this machine offers 4"):
        command.slots_of(run, ["a GPU"] * 4)
    run.serve.servers = 2
    assert [slot.devices for slot in command.slots_of(run, ["a GPU"] * 4)] == [("0", "1"), ("2", "3")]


def test_serve_help_teaches(capsys):
    with pytest.raises(SystemExit):
        cli.main(["serve", "--help"])
    shown = capsys.readouterr().out
    assert all(word in shown for word in ("--check", "serve.servers=2", "sglang.mem_fraction_static", "CLIPO_API_KEY"))
