import json
import math

import pytest

from gpt2rt.errors import CheckpointError
from gpt2rt.generation import GenerationConfig
from gpt2rt.generation.config import DEFAULTS, FIELDS, UNSUPPORTED


def test_fields_and_defaults_are_transformers(hf):
    reference = hf.module.GenerationConfig()
    theirs = {name for name in vars(reference) if name not in ("_from_model_config", "transformers_version")}
    assert set(FIELDS) - {"seed"} == theirs
    assert all(getattr(GenerationConfig(), name) is None for name in FIELDS)
    for name, value in reference._get_default_generation_params().items():
        if name in DEFAULTS:
            assert DEFAULTS[name] == value, name
        else:
            assert value is None or value in UNSUPPORTED[name], name


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("temperature", [-1, 0, math.nan, math.inf, "hot", True]),
        ("top_p", [0, 1.5, -0.1, math.nan, "x"]),
        ("top_k", [-1, 2.5, 2**40, True]),
        ("min_p", [2, -0.1, math.nan]),
        ("repetition_penalty", [0, -1, math.nan, math.inf]),
        ("max_new_tokens", [0, -1, 2**70, 1.5, "9"]),
        ("max_length", [0, -5]),
        ("min_new_tokens", [-1, 0.5]),
        ("num_return_sequences", [0, -1, 2**40]),
        ("seed", [2**63, -(2**63) - 1, 1.5]),
        ("stop_strings", ["", [], [""], ["a", ""], [1], 5]),
        ("max_time", [0, -1, math.nan, math.inf]),
        ("eos_token_id", [-1, [], [1, -2], "x", 1.0, [True]]),
        ("pad_token_id", [-1, 1.5, [1]]),
        ("bad_words_ids", [[], [[]], [1], [[-1]], "x"]),
        ("suppress_tokens", [[-1], 5, [1.5]]),
        ("no_repeat_ngram_size", [-1, 1.5]),
        ("do_sample", [1, "yes"]),
        ("use_cache", [0]),
    ],
)
def test_values_out_of_range_are_refused(field, values):
    for value in values:
        with pytest.raises(ValueError, match=field):
            GenerationConfig(**{field: value})
        config = GenerationConfig(max_length=7)
        with pytest.raises(ValueError, match=field):
            config.update(**{"max_length": 9, field: value})
        assert config == GenerationConfig(max_length=7), "a failed update must change nothing"


def test_values_at_the_edges_are_accepted():
    GenerationConfig(
        temperature=1e-30,
        top_p=1,
        top_k=0,
        min_p=0,
        max_new_tokens=10**12,
        seed=-(2**63),
        suppress_tokens=[],
        eos_token_id=[5, 6],
        stop_strings="a",
    )


def test_unknown_fields_are_named():
    with pytest.raises(ValueError, match="max_tokenz, temprature"):
        GenerationConfig(temprature=1.0, max_tokenz=5)
    with pytest.raises(ValueError, match="belongs in the call of generate"):
        GenerationConfig(logits_processor=[])


def test_update_returns_what_it_did_not_take():
    config = GenerationConfig(top_k=5)
    assert config.update(top_k=7, attention_mask="mask") == {"attention_mask": "mask"}
    assert config.top_k == 7


@pytest.mark.parametrize("name", [name for name in UNSUPPORTED if name != "disable_compile"])
def test_what_is_not_done_yet_is_refused_by_name(name):
    config = GenerationConfig(**{name: "something"})
    with pytest.raises(ValueError, match=rf"does not support {name}='something' yet"):
        config.refuse_unsupported()


def test_neutral_values_are_not_refused(hf):
    neutral = hf.module.GenerationConfig()._get_default_generation_params()
    GenerationConfig(**neutral, disable_compile=True).refuse_unsupported()
    with pytest.raises(ValueError, match="num_beams=4"):
        GenerationConfig(num_beams=4).refuse_unsupported()


def test_several_greedy_sequences_are_refused():
    with pytest.raises(ValueError, match="do_sample=True"):
        GenerationConfig(num_return_sequences=2)
    GenerationConfig(num_return_sequences=2, do_sample=True)


def test_round_trip_through_a_folder(tmp_path):
    config = GenerationConfig(max_new_tokens=5, eos_token_id=[1, 2], do_sample=True, temperature=0.5, num_beams=3)
    config.save_pretrained(tmp_path)
    assert GenerationConfig.from_pretrained(tmp_path) == config
    assert GenerationConfig.from_pretrained(tmp_path, temperature=0.6).temperature == 0.6
    with pytest.raises(ValueError, match="nonsense"):
        GenerationConfig.from_pretrained(tmp_path, nonsense=1)
    assert json.loads((tmp_path / "generation_config.json").read_text())["max_new_tokens"] == 5


def test_transformers_reads_our_file_and_we_read_theirs(tmp_path, hf):
    GenerationConfig(max_new_tokens=5, do_sample=True, top_p=0.9, eos_token_id=3).save_pretrained(tmp_path / "ours")
    theirs = hf.module.GenerationConfig.from_pretrained(tmp_path / "ours")
    assert (theirs.max_new_tokens, theirs.do_sample, theirs.top_p, theirs.eos_token_id) == (5, True, 0.9, 3)
    theirs.save_pretrained(tmp_path / "theirs")
    assert GenerationConfig.from_pretrained(tmp_path / "theirs") == GenerationConfig(
        max_new_tokens=5, do_sample=True, top_p=0.9, eos_token_id=3
    )


def test_files_keep_keys_that_are_no_field(tmp_path):
    (tmp_path / "generation_config.json").write_text('{"top_k": 3, "of_a_later_version": 1, "_commit_hash": "x"}')
    config = GenerationConfig.from_pretrained(tmp_path)
    config.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "generation_config.json").read_text()) == {"top_k": 3, "of_a_later_version": 1}


def test_missing_and_damaged_files(tmp_path):
    with pytest.raises(CheckpointError, match=r"generation_config\.json"):
        GenerationConfig.from_pretrained(tmp_path)
    (tmp_path / "generation_config.json").write_text('{"top_k": ')
    with pytest.raises(OSError, match=r"generation_config\.json"):
        GenerationConfig.from_pretrained(tmp_path)
    (tmp_path / "generation_config.json").write_text('{"top_k": -4}')
    with pytest.raises(ValueError, match="top_k"):
        GenerationConfig.from_pretrained(tmp_path)


def test_from_model_config(model):
    config = GenerationConfig.from_model_config(model.config)
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (1, 2, 0)
    assert config.max_length is None
    old = GenerationConfig.from_model_config({"eos_token_id": 5, "top_k": 9, "n_embd": 8, "output_attentions": True})
    assert old == GenerationConfig(eos_token_id=5, top_k=9)
