"""Broken or malicious settings give a configuration or an error that names the field."""

import dataclasses
import json

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from lorasb_kernels import LoRASBConfig
from lorasb_kernels.train.config import TrainConfig, fields
from lorasb_kernels.train.errors import ConfigError
from lorasb_kernels.train.settings_file import load_file, resolve
from tests.trust.conftest import LITTLE, MUCH
from tests.trust.watching import bounded_memory, watched

# Nine lists of nine lists of nine …: 9⁸ texts when written out.
PAIRS = list(zip("abcdefg", "bcdefgh", strict=True))
NESTED = ["&a [x, x, x, x, x, x, x, x, x]", *(f"&{b} [{f'*{a}, ' * 9}]" for a, b in PAIRS)]
BOMB = "".join(f"{text[1]}: {text}\n" for text in NESTED)
KNOWN_BOMB = f"report_to: [{', '.join(NESTED)}]\n"

VALUES = """
1 | -1 | 0 | 1e400 | .nan | -.inf | true | null | 2001-99-99 | !!int '' | !!float x | !!bool x
!!timestamp x | !!binary x | !!null | !!set {a, b} | !!python/name:os.system | "\\0" | ' | ../../etc
!!python/object/apply:os.system [id] | [1, 2] | [a, [b]] | {a: b} | &x [*x] | *y | ? [a] | '('
lora-sb | all-linear | (a+)+$ | float32 | causal-lm
"""
NAMED_VALUES = [value for line in VALUES.split("\n") for value in line.split(" | ")]
HUGE_NUMBERS = ["0x" + "f" * 5000, "1" + "0" * 400]

scalars = st.text(max_size=12) | st.sampled_from(NAMED_VALUES + HUGE_NUMBERS)
keys = st.sampled_from([*fields(), "preset", "<<"]) | st.text(max_size=6)
mappings = st.lists(st.tuples(keys, scalars), max_size=6).map(
    lambda items: "".join(f"{key}: {value}\n" for key, value in items)
)
texts = (
    mappings | mappings.map("model: m\ndata: d\noutput_dir: o\n{}".format) | st.text(max_size=40)
)
GIVEN = {"model": "m", "data": "d", "output_dir": "o"}


@pytest.fixture(scope="module", autouse=True)
def imports(tmp_path_factory):
    """What reading imports at its first call."""
    path = tmp_path_factory.mktemp("warm") / "x.yaml"
    path.write_text("preset: arithmetic\nlearning_rate: 1e-3\nseed: 2001-01-01\nmodel: é")
    with pytest.raises(ConfigError):
        resolve(load_file(path))


def check(folder, content: bytes):
    path = folder / "config.yaml"
    path.write_bytes(content)
    message, config = "", None
    with watched():
        try:
            config = resolve(GIVEN, load_file(path))
        except ConfigError as error:
            message = str(error)
    assert (message != "") == (config is None)
    assert len(message) < 2500
    if config is not None:
        assert TrainConfig(**config.to_dict()) == config
        assert all(isinstance(item, str) for item in config.report_to)


@settings(LITTLE)
@given(texts.map(lambda text: text.encode("utf-8", "replace")) | st.binary(max_size=40))
@example(BOMB.encode())
@example(KNOWN_BOMB.encode())
@example(b"[" * 20_000)
@example(b"report_to: [1]")
@example(b"model: '\\ud800'")
@example(b'model: "\\0"')
@example(b"learning_rate: 1" + b"0" * 400)
@example(b"batch_size: 0x" + b"f" * 5000)
@example(b"seed: -1")
@example(b"max_grad_norm: .nan")
@example(b"\xff\xfe")
@example("model: 模型".encode("gbk"))
def test_a_run_or_a_named_error(tmp_path_factory, content):
    with bounded_memory(200):
        check(tmp_path_factory.getbasetemp(), content)


@pytest.mark.slow
@settings(MUCH)
@given(texts.map(lambda text: text.encode("utf-8", "replace")) | st.binary(max_size=40))
def test_ten_thousand_files(tmp_path_factory, content):
    check(tmp_path_factory.getbasetemp(), content)


def test_a_file_of_any_size_is_refused_before_it_is_read(tmp_path):
    path = tmp_path / "config.yaml"
    with path.open("wb") as file:
        file.truncate(8 << 30)
    with bounded_memory(100), pytest.raises(ConfigError, match=r"config\.yaml.* bytes; expected"):
        load_file(path)


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(-(10**400), 10**400)
    | st.floats()
    | st.text(max_size=10)
    | st.sampled_from(["lora-sb", "lora-xs", "auto", "all-linear", "(", "__import__('os')", "B"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner),
    max_leaves=5,
)
names = st.sampled_from(sorted(LoRASBConfig.__dataclass_fields__)) | st.text(max_size=6)
adapter_settings = st.fixed_dictionaries({"r": st.just(4)}).flatmap(
    lambda base: st.dictionaries(names, json_values, max_size=3).map(lambda other: base | other)
)


@settings(LITTLE)
@given(adapter_settings)
@example({"r": 4, "lora_alpha": 10**400})
@example({"r": 4, "scaling": 10**400})
@example({"r": 4, "seed": 10**400})
@example({"r": 4, "code": "__import__('os').system('id')"})
def test_an_adapter_configuration_or_a_named_error(settings):
    known = {field.name for field in dataclasses.fields(LoRASBConfig)}
    with watched():
        try:
            config = LoRASBConfig.from_dict(json.loads(json.dumps(settings)))
        except (TypeError, ValueError) as error:
            message = str(error)
        else:
            message, settings = "", config.to_dict()
    assert not message or any(name in message for name in settings)
    if not message:
        assert set(settings) == known


@pytest.mark.slow
@settings(MUCH)
@given(adapter_settings)
def test_ten_thousand_adapter_configurations(settings):
    test_an_adapter_configuration_or_a_named_error.hypothesis.inner_test(settings)
