import json
import math

import pytest

from gpt2rt.errors import CheckpointError
from gpt2rt.generation import GenerationConfig
from gpt2rt.generation.config import DEFAULTS, FIELD_STATUS, FIELDS, UNSUPPORTED
from gpt2rt.generation.fields import OWN_FIELDS


@pytest.mark.proves("G1")
def test_fields_and_defaults_are_transformers(hf):
    reference = hf.module.GenerationConfig()
    theirs = {name for name in vars(reference) if name not in ("_from_model_config", "transformers_version")}
    assert set(FIELDS) - set(OWN_FIELDS) == theirs
    assert all(getattr(GenerationConfig(), name) is None for name in FIELDS)
    for name, value in reference._get_default_generation_params().items():
        if name in DEFAULTS:
            assert DEFAULTS[name] == value, name
        else:
            assert value is None or value in UNSUPPORTED[name].neutral, name


def test_every_field_of_transformers_is_honoured_or_refused(hf):
    theirs = {name for name in vars(hf.module.GenerationConfig()) if not name.startswith("_")} - {
        "transformers_version"
    }
    assert theirs <= set(FIELD_STATUS)
    for name, (status, sentence) in FIELD_STATUS.items():
        assert status == ("honoured" if name in DEFAULTS else "refused")
        assert sentence[0].isupper(), name
        assert sentence.endswith("."), name


@pytest.mark.proves("fault:F37")
@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("temperature", [-1, math.nan, math.inf, "hot", True]),
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
        ("early_stopping", [1, "always", 0.5]),
        ("context_policy", ["cut", True]),
        ("context_stride", [0, 1.5]),
        ("cache_implementation", ["fast", 1]),
        ("cache_config", [5]),
        ("max_cache_len", [0]),
        ("prefill_chunk_size", [0, 2.5]),
        ("low_memory", [1]),
        ("disable_compile", ["no"]),
        ("top_h", [0, 1.1, math.nan]),
        ("typical_p", [0, 1.5, "x"]),
        ("epsilon_cutoff", [-0.1, 1, math.nan]),
        ("eta_cutoff", [-0.1, 1, "x"]),
        ("encoder_repetition_penalty", [0, -1, math.inf]),
        ("length_penalty", [math.nan, math.inf, "x"]),
        ("encoder_no_repeat_ngram_size", [-1, 1.5]),
        ("renormalize_logits", [1]),
        ("remove_invalid_values", ["yes"]),
        ("forced_bos_token_id", [-1, [1]]),
        ("forced_eos_token_id", [-1, [], "x"]),
        ("exponential_decay_length_penalty", [5, (1,), (-1, 1.1), (1, 0.0), (1.5, 1.1), (1, math.inf)]),
        (
            "sequence_bias",
            [[], {}, {5: 1.0}, {(): 1.0}, {(5,): math.nan}, [[[5], "x"]], [[5, 1.0]], {(-1,): 1.0}, {(5,): 1e38}, "x"],
        ),
        ("token_healing", [1]),
        ("guidance_scale", [math.nan, "x", True]),
        ("is_assistant", [1]),
        ("num_assistant_tokens", [0, 1.5]),
        ("num_assistant_tokens_schedule", ["sometimes"]),
        ("assistant_confidence_threshold", [-0.1, 1.1]),
        ("prompt_lookup_num_tokens", [0]),
        ("max_matching_ngram_size", [0]),
        ("assistant_early_exit", [0]),
        ("assistant_lookbehind", [0]),
        ("target_lookbehind", [0]),
        ("output_attentions", [1]),
        ("output_hidden_states", [1]),
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


@pytest.mark.proves("fault:F37")
def test_temperature_0_is_refused_with_sampling_only():
    config = GenerationConfig.from_dict({"temperature": 0.0})
    for settings in ({"do_sample": True, "temperature": 0.0}, {"do_sample": True, "temperature": 0}):
        with pytest.raises(ValueError, match=r"temperature must be a number above 0 .*do_sample=False.*, got 0"):
            GenerationConfig(**settings)
    with pytest.raises(ValueError, match="temperature must be a number above 0"):
        config.update(do_sample=True)
    assert config.do_sample is None


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
        early_stopping="never",
        top_h=1,
        typical_p=1,
        epsilon_cutoff=0,
        length_penalty=-2,
        guidance_scale=0,
        sequence_bias={(1, 2): -math.inf},
        exponential_decay_length_penalty=[0, 0.5],
        forced_eos_token_id=[1, 2],
        compile_config=object(),
        context_policy="sliding",
        context_stride=1,
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


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_what_is_not_done_is_refused_by_name(name):
    config = GenerationConfig(**{name: "something"})
    with pytest.raises(ValueError, match=rf"does not support {name}='something': .*; leave it unset"):
        config.refuse_unsupported()


def test_neutral_values_are_not_refused(hf):
    neutral = hf.module.GenerationConfig()._get_default_generation_params()
    GenerationConfig(**neutral, use_mtp=False, penalty_alpha=0.0, disable_compile=True).refuse_unsupported()


@pytest.mark.proves("G7")
def test_numbers_of_sequences():
    with pytest.raises(ValueError, match="do_sample=True"):
        GenerationConfig(num_return_sequences=2)
    with pytest.raises(ValueError, match="smaller or equal to `num_beams`"):
        GenerationConfig(num_return_sequences=4, num_beams=3, do_sample=True)
    GenerationConfig(num_return_sequences=2, do_sample=True)
    GenerationConfig(num_return_sequences=3, num_beams=3)


@pytest.mark.parametrize("forced", [3, [3, 4]])
@pytest.mark.parametrize("name", ["forced_bos_token_id", "forced_eos_token_id"])
def test_a_token_both_forced_and_suppressed_is_refused(name, forced):
    if name == "forced_bos_token_id":
        forced = 3
    with pytest.raises(ValueError, match=f"suppress_tokens holds all of {name}"):
        GenerationConfig(suppress_tokens=[3, 4, 5], **{name: forced})
    GenerationConfig(suppress_tokens=[4, 5], **{name: forced})


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


EVERYTHING = {
    "do_sample": True,
    "num_beams": 3,
    "early_stopping": "never",
    "length_penalty": 0.7,
    "typical_p": 0.9,
    "top_h": 0.5,
    "epsilon_cutoff": 0.001,
    "eta_cutoff": 0.002,
    "encoder_repetition_penalty": 1.1,
    "encoder_no_repeat_ngram_size": 3,
    "renormalize_logits": True,
    "forced_bos_token_id": 4,
    "forced_eos_token_id": [5, 6],
    "remove_invalid_values": True,
    "exponential_decay_length_penalty": [4, 1.2],
    "sequence_bias": [[[5, 6], -1.5], [[7], 2.0]],
    "token_healing": True,
    "guidance_scale": 1.5,
    "num_assistant_tokens": 5,
    "num_assistant_tokens_schedule": "heuristic",
    "prompt_lookup_num_tokens": 3,
    "output_attentions": True,
    "return_dict_in_generate": True,
    "max_new_tokens": 7,
    "bad_words_ids": [[4, 5]],
}


@pytest.mark.parametrize("bias", [EVERYTHING["sequence_bias"], {(5, 6): -1.5, (7,): 2.0}])
def test_every_field_goes_through_files_both_ways(tmp_path, hf, bias):
    ours = GenerationConfig(**EVERYTHING | {"sequence_bias": bias})
    theirs = hf.module.GenerationConfig(**EVERYTHING | {"sequence_bias": bias})
    ours.save_pretrained(tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    assert GenerationConfig.from_pretrained(tmp_path / "ours") == GenerationConfig(**EVERYTHING)
    read = GenerationConfig.from_pretrained(tmp_path / "theirs")
    assert read == ours
    assert not any(name in read.to_diff_dict() for name in OWN_FIELDS)
    # they read our file: a dict with tuples as keys cannot be in it, so it holds the list that means the same
    read = hf.module.GenerationConfig.from_pretrained(tmp_path / "ours")
    assert {name: getattr(read, name) for name in EVERYTHING} == EVERYTHING
    assert GenerationConfig.from_dict(read.to_dict()) == GenerationConfig(**EVERYTHING)


def test_objects_in_a_file(tmp_path, hf):
    config = GenerationConfig(compile_config=hf.module.CompileConfig())
    config.save_pretrained(tmp_path)
    assert GenerationConfig.from_pretrained(tmp_path).compile_config["fullgraph"] in (True, False)
    with pytest.raises(ValueError, match="cannot be written"):
        GenerationConfig(compile_config=object()).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="sequence_bias"):
        GenerationConfig.from_dict({"sequence_bias": {"(5, x)": 1.0}})


def test_unused_arguments_can_be_had_back(tmp_path):
    config = {"top_k": 3, "of_a_later_version": 1}
    read, unused = GenerationConfig.from_dict(config, top_p=0.5, nonsense=2, return_unused_kwargs=True)
    assert (read.top_k, read.top_p, unused) == (3, 0.5, {"nonsense": 2})
    read.to_json_file(tmp_path / "generation_config.json")
    read, unused = GenerationConfig.from_pretrained(tmp_path, top_k=4, nonsense=2, return_unused_kwargs=True)
    assert (read.top_k, read.top_p, read.of_a_later_version, unused) == (4, 0.5, 1, {"nonsense": 2})


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
