"""AutoTokenizer and the classes it chooses, against transformers' AutoTokenizer on the same folders."""

import copy
import json
import pickle
import warnings

import pytest
import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

import gpt2rt
from gpt2rt import (
    AutoTokenizer,
    BertTokenizer,
    BertTokenizerFast,
    GPT2Config,
    GPT2LMHeadModel,
    GPT2Tokenizer,
    OpenAIGPTTokenizer,
    PreTrainedTokenizerFast,
    StreamDecoder,
    TokenizerError,
)
from gpt2rt.errors import CheckpointError

CORPUS = [
    "The cat sat on the mat, didn't it?",
    "안녕하세요 세계 여러분",
    "東京 大学 est là",
    "été 123 45.6 ok",
    "ÀÉ ok",
] * 4
LLAMA_3 = "|".join(
    [
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)",
        r"[^\r\n\p{L}\p{N}]?\p{L}+",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",
        r"\s*[\r\n]+|\s+(?!\S)|\s+",
    ]
)


def write(folder, **files):
    """A folder with these files; dictionaries become JSON, and ``json_`` in a name stands for ".json"."""
    folder.mkdir(exist_ok=True)
    for name, content in files.items():
        stem, _, suffix = name.rpartition("_")
        text = content if isinstance(content, str) else json.dumps(content)
        (folder / f"{stem}.{suffix}").write_text(text, encoding="utf-8")
    return folder


def bert_vocab():
    specials = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    letters = "abcdefghijklmnopqrstuvwxyzTÀé東京大学,.'?"
    return [*specials, *letters, *(f"##{c}" for c in letters), "the", "cat", "##at", "est", "là", "la", "did"]


# ---- WordPiece (Chinese GPT-2) ---------------------------------------------------------------------------------------

BERT_SETTINGS = [
    {},
    {"do_lower_case": False},
    {"do_lower_case": False, "strip_accents": True, "tokenize_chinese_chars": False},
    {"strip_accents": False},
    {"clean_up_tokenization_spaces": True, "model_max_length": 1024, "padding_side": "left"},
]


@pytest.mark.proves("T13", "I15")
@pytest.mark.parametrize("settings", BERT_SETTINGS, ids=str)
def test_wordpiece_folders(hf, texts, tmp_path, settings):
    config = {"tokenizer_class": "BertTokenizer", **settings}
    vocab = "\n".join(bert_vocab()) + "\n"
    folder = write(tmp_path / "m", vocab_txt=vocab, tokenizer_config_json=config, config_json={"model_type": "gpt2"})
    ours, theirs = AutoTokenizer.from_pretrained(folder), hf.module.AutoTokenizer.from_pretrained(folder)
    assert type(ours) is BertTokenizer is BertTokenizerFast
    batch = [*texts[:300], *CORPUS[:5], "the cat [MASK] [SEP]x"]
    assert dict(ours(batch)) == dict(theirs(batch))
    for call in (
        {"padding": True, "return_special_tokens_mask": True, "return_offsets_mapping": True},
        {"truncation": True, "max_length": 7},
        {"add_special_tokens": False},
    ):
        assert dict(ours(batch, CORPUS[:1] * len(batch), **call)) == dict(
            theirs(batch, CORPUS[:1] * len(batch), **call)
        )
    rows = ours(batch)["input_ids"]
    for skip in (False, True):
        for clean in (None, False, True):
            call = {"skip_special_tokens": skip, "clean_up_tokenization_spaces": clean}
            assert ours.batch_decode(rows, **call) == theirs.batch_decode(rows, **call)
    assert ours.special_tokens_map == theirs.special_tokens_map
    assert ours("the", "cat").sequence_ids() == theirs("the", "cat").sequence_ids()


@pytest.mark.proves("T13", "T8")
def test_wordpiece_files_travel_both_ways(hf, texts, tmp_path):
    write(tmp_path / "m", vocab_txt="\n".join(bert_vocab()))
    ours = BertTokenizer.from_pretrained(tmp_path / "m", do_lower_case=False)
    theirs = hf.module.BertTokenizer.from_pretrained(tmp_path / "m", do_lower_case=False)
    for tokenizer in (ours, theirs):
        tokenizer.add_tokens(["plainword"])
        tokenizer.add_special_tokens({"eos_token": "[END]"})
    ours.save_pretrained(tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    ours.save_pretrained(tmp_path / "old", legacy_format=True)
    assert (tmp_path / "ours" / "vocab.txt").read_text(encoding="utf-8").split("\n") == [*bert_vocab(), ""]
    read_back = [
        hf.module.AutoTokenizer.from_pretrained(tmp_path / "ours"),
        *(AutoTokenizer.from_pretrained(tmp_path / name) for name in ("ours", "theirs", "old")),
        BertTokenizer(tmp_path / "ours" / "vocab.txt", do_lower_case=False),
        BertTokenizer(vocab_file=tmp_path / "ours" / "vocab.txt", do_lower_case=False),
    ]
    batch = [*texts[:100], "The plainword[END] cat"]
    for tokenizer in read_back:
        known = batch if len(tokenizer) == len(ours) else batch[:100]
        assert tokenizer(known)["input_ids"] == ours(known)["input_ids"] == theirs(known)["input_ids"]
    assert pickle.loads(pickle.dumps(ours))(batch) == ours(batch)


@pytest.mark.proves("T6", "T13")
def test_no_other_tokens_around_wordpiece_texts():
    tokenizer = BertTokenizer({"[UNK]": 0, "a": 1}, bos_token="<s>", add_bos_token=True)
    with pytest.raises(
        TokenizerError, match=r"have no place here: BertTokenizer puts \[CLS\] before and \[SEP\] after"
    ):
        tokenizer("a")
    tokenizer.add_bos_token = False
    assert tokenizer.tokenize("a", add_special_tokens=True) == ["[CLS]", "a", "[SEP]"]


@pytest.mark.proves("T13")
def test_the_old_bert_vocabulary_with_windows_line_ends(tmp_path):
    write(tmp_path / "m", vocab_txt="\r\n".join(bert_vocab()) + "\r\n")
    assert AutoTokenizer.from_pretrained(tmp_path / "m").tokenize("the cat") == ["the", "cat"]


# ---- tokenizer.json of any kind (KoGPT2, ...) ------------------------------------------------------------------------


def kogpt2():
    """BPE over words marked with "▁", as SKT's KoGPT2."""
    made = Tokenizer(models.BPE(unk_token="<unk>"))
    made.normalizer = normalizers.NFKC()
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.decoder = decoders.Metaspace()
    specials = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    made.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=150, special_tokens=specials, show_progress=False))
    return made, {"bos_token": "</s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}


def unigram():
    made = Tokenizer(models.Unigram())
    made.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " ")])
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=120, special_tokens=["<unk>", "<s>", "</s>"], unk_token="<unk>", show_progress=False
    )
    made.train_from_iterator(CORPUS, trainer)
    made.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> $B:1 </s>:1", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    return made, {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}


def byte_level():
    """As Llama 3's: digits apart, its own pattern, then bytes."""
    made = Tokenizer(models.BPE(ignore_merges=True))
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(LLAMA_3), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    made.decoder = decoders.ByteLevel()
    made.post_processor = processors.ByteLevel(trim_offsets=True)
    made.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(
            vocab_size=300,
            special_tokens=["<|eot|>"],
            show_progress=False,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        ),
    )
    made.add_tokens([AddedToken("<plain>", lstrip=True), AddedToken("word", single_word=True)])
    return made, {"eos_token": "<|eot|>"}


def fallback():
    """As Llama 2's: no pre-tokenizer, bytes for unknown characters."""
    made = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    specials = ["<unk>", "<s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=330, special_tokens=specials, show_progress=False)
    made.train_from_iterator(CORPUS[:1], trainer)
    data = json.loads(made.to_str())
    data["added_tokens"] = data["added_tokens"][:2]
    return Tokenizer.from_str(json.dumps(data)), {"bos_token": "<s>", "unk_token": "<unk>", "add_bos_token": True}


def words():
    made = Tokenizer(models.WordLevel(unk_token="[UNK]"))
    made.normalizer = normalizers.Sequence([normalizers.NFD(), normalizers.StripAccents(), normalizers.Lowercase()])
    made.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Whitespace(), pre_tokenizers.Digits(True)])
    made.train_from_iterator(CORPUS, trainers.WordLevelTrainer(special_tokens=["[UNK]", "[SEP]"], show_progress=False))
    made.post_processor = processors.RobertaProcessing(("[SEP]", 1), ("[UNK]", 0))
    return made, {"unk_token": "[UNK]", "sep_token": "[SEP]"}


KINDS = {make.__name__: make for make in (kogpt2, unigram, byte_level, fallback, words)}


@pytest.fixture(scope="module", params=KINDS)
def any_json(request, tmp_path_factory):
    made, names = KINDS[request.param]()
    folder = tmp_path_factory.mktemp(request.param)
    write(folder, tokenizer_json=made.to_str(), config_json={"model_type": "gpt2", "vocab_size": 400})
    return write(folder, tokenizer_config_json={"tokenizer_class": "PreTrainedTokenizerFast", **names})


@pytest.mark.proves("T13", "I14", "I16")
def test_any_tokenizer_json(any_json, hf, texts):
    ours, theirs = AutoTokenizer.from_pretrained(any_json), hf.module.AutoTokenizer.from_pretrained(any_json)
    assert type(ours) is PreTrainedTokenizerFast
    batch = [*texts[:400], *CORPUS[:5], "a <plain>word sword <s>x</s> <|eot|>[SEP]"]
    assert dict(ours(batch)) == dict(theirs(batch))
    assert dict(ours(batch[:50], batch[50:100], return_offsets_mapping=True)) == dict(
        theirs(batch[:50], batch[50:100], return_offsets_mapping=True)
    )
    rows = theirs(batch)["input_ids"]
    for skip in (False, True):
        for clean in (None, True):
            call = {"skip_special_tokens": skip, "clean_up_tokenization_spaces": clean}
            assert ours.batch_decode(rows, **call) == theirs.batch_decode(rows, **call)
    assert ours.special_tokens_map == theirs.special_tokens_map
    assert ours.num_special_tokens_to_add(True) == theirs.num_special_tokens_to_add(True)
    assert ours.all_special_ids == theirs.all_special_ids


@pytest.mark.proves("T13", "T8")
def test_any_tokenizer_travels_both_ways(any_json, hf, texts, tmp_path):
    ours, theirs = AutoTokenizer.from_pretrained(any_json), hf.module.AutoTokenizer.from_pretrained(any_json)
    for tokenizer in (ours, theirs):
        tokenizer.add_special_tokens({"pad_token": "<|new pad|>"})
        tokenizer.add_tokens(["<new>"])
    ours.save_pretrained(tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    batch = [*texts[:100], "x <new>y"]
    expected = theirs(batch, padding=True)
    assert dict(ours(batch, padding=True)) == dict(expected)
    for tokenizer in (
        hf.module.AutoTokenizer.from_pretrained(tmp_path / "ours"),
        AutoTokenizer.from_pretrained(tmp_path / "ours"),
        AutoTokenizer.from_pretrained(tmp_path / "theirs"),
        PreTrainedTokenizerFast(tokenizer_object=ours.backend_tokenizer, pad_token="<|new pad|>"),
        pickle.loads(pickle.dumps(ours)),
        copy.deepcopy(ours),
    ):
        assert dict(tokenizer(batch, padding=True)) == dict(expected)
    with pytest.raises(TokenizerError, match=r"has no files besides tokenizer.json"):
        ours.save_vocabulary(tmp_path)
    with pytest.raises(TokenizerError, match="legacy_format=True"):
        ours.save_pretrained(tmp_path, legacy_format=True)


@pytest.mark.proves("T9", "I18")
def test_added_tokens_and_a_resized_embedding(small, hf, tmp_path):
    torch.manual_seed(0)
    tokenizer = GPT2Tokenizer(*small)
    model = GPT2LMHeadModel(
        GPT2Config(vocab_size=len(tokenizer), n_embd=16, n_layer=1, n_head=2, n_positions=32)
    ).eval()
    tokenizer.add_tokens(["<new>"])
    tokenizer.add_special_tokens({"pad_token": "<|pad|>"})
    model.resize_token_embeddings(len(tokenizer))
    with torch.no_grad():
        model.get_input_embeddings().weight[-2:].normal_()
    tokenizer.save_pretrained(tmp_path)
    model.save_pretrained(tmp_path)
    batch = tokenizer(["to <new>be", "or<new>"], padding=True, return_tensors="pt")
    assert {300, 301} <= set(batch["input_ids"].flatten().tolist())
    with torch.no_grad():
        expected = model(**batch).logits
        for module in (gpt2rt, hf.module):
            read = module.AutoTokenizer.from_pretrained(tmp_path)
            again = read(["to <new>be", "or<new>"], padding=True, return_tensors="pt")
            assert torch.equal(again["input_ids"], batch["input_ids"])
            logits = module.GPT2LMHeadModel.from_pretrained(tmp_path).eval()(**again).logits
            # what stands at padding is nobody's business
            kept = batch["attention_mask"].bool()
            torch.testing.assert_close(logits[kept], expected[kept], rtol=0, atol=2e-5)


@pytest.mark.proves("T13")
def test_streams_of_any_kind(any_json, texts):
    tokenizer = AutoTokenizer.from_pretrained(any_json)
    for text in texts[:150]:
        ids = tokenizer.encode(text)
        stream = StreamDecoder(tokenizer, skip_special_tokens=False)
        assert "".join(stream.put([token]) for token in ids) + stream.end() == tokenizer.decode(ids)


@pytest.mark.proves("T6", "T13")
def test_the_template_of_a_file_and_the_switches(tmp_path):
    made, names = unigram()
    write(tmp_path / "m", tokenizer_json=made.to_str(), tokenizer_config_json=names)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tmp_path / "m")
    assert tokenizer.tokenize("cat", add_special_tokens=True)[:: len(tokenizer.encode("cat")) - 1] == ["<s>", "</s>"]
    tokenizer.add_bos_token = True
    assert tokenizer.tokenize("", add_special_tokens=True) == ["<s>"]
    assert PreTrainedTokenizerFast.from_pretrained(tmp_path / "m", add_eos_token=True).encode("") == [2]


@pytest.mark.proves("T5", "D3")
def test_words_split_elsewhere(tmp_path):
    made, _ = byte_level()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made)
    with pytest.raises(TokenizerError, match="would glue the words together"):
        tokenizer(["The", "cat"], is_split_into_words=True)
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made)
    assert tokenizer.encode(["The", "cat"], is_split_into_words=True) == tokenizer.encode(" The cat")
    assert tokenizer.encode("cat", add_prefix_space=True) == tokenizer.encode(" cat")


# ---- which class -----------------------------------------------------------------------------------------------------


@pytest.fixture
def folders(tmp_path, tokenizer, openai_files):
    """One folder of each kind, without tokenizer_config.json."""
    small_gpt1 = OpenAIGPTTokenizer({"<unk>": 0, "a": 1, "a</w>": 2, "b</w>": 3, "ab</w>": 4}, [("a", "b</w>")])
    made = {
        "gpt2": tokenizer,
        "gpt1": small_gpt1,
        "bert": BertTokenizer({token: i for i, token in enumerate(bert_vocab())}),
        "any": PreTrainedTokenizerFast(tokenizer_object=kogpt2()[0]),
    }
    for name, one in made.items():
        one.save_pretrained(tmp_path / name, legacy_format=False)
        if name != "any":
            one.save_pretrained(tmp_path / f"{name}_old", legacy_format=True)
        for path in tmp_path.glob("*/tokenizer_config.json"):
            path.unlink()
    return tmp_path


@pytest.mark.proves("T13", "I14", "I16")
@pytest.mark.parametrize(
    ("name", "config", "expected"),
    [
        ("gpt2", None, GPT2Tokenizer),
        ("gpt2_old", {"model_type": "gpt2"}, GPT2Tokenizer),
        ("gpt1", {"model_type": "openai-gpt"}, OpenAIGPTTokenizer),
        ("gpt1", None, OpenAIGPTTokenizer),
        ("gpt1_old", {"model_type": "openai-gpt"}, OpenAIGPTTokenizer),
        ("bert", {"model_type": "gpt2", "tokenizer_class": "BertTokenizerFast"}, BertTokenizer),
        ("bert_old", {"model_type": "gpt2"}, BertTokenizer),
        ("any", {"model_type": "gpt2"}, PreTrainedTokenizerFast),
    ],
)
def test_the_class_follows_the_files_and_the_model(folders, name, config, expected):
    if config:
        write(folders / name, config_json=config)
    tokenizer = AutoTokenizer.from_pretrained(folders / name)
    assert type(tokenizer) is expected
    assert tokenizer.encode("a b")


@pytest.mark.proves("T13")
def test_the_class_named_by_the_caller(folders):
    assert type(AutoTokenizer.from_pretrained(folders / "bert", tokenizer_type="bert")) is BertTokenizer
    config = {"tokenizer_class": "BertTokenizer"}
    assert type(AutoTokenizer.from_pretrained(folders / "bert", config=config, do_lower_case=False)) is BertTokenizer
    with pytest.raises(TokenizerError, match="tokenizer_type = 'llama', known: gpt2, openai-gpt, bert"):
        AutoTokenizer.from_pretrained(folders / "bert", tokenizer_type="llama")
    with pytest.raises(TypeError, match="unknown keywords: 'lower'"):
        AutoTokenizer.from_pretrained(folders / "bert", lower=True)
    with pytest.raises(ValueError, match="never runs code"):
        AutoTokenizer.from_pretrained(folders / "bert", trust_remote_code=True)
    with pytest.raises(OSError, match=r"use AutoTokenizer.from_pretrained"):
        AutoTokenizer()


@pytest.mark.proves("T13", "I14")
def test_a_class_that_does_not_match_is_refused(folders):
    for name, asked, message in (
        (
            "bert_old",
            GPT2Tokenizer,
            r"has vocab.txt, a WordPiece vocabulary.*GPT2Tokenizer needs.*AutoTokenizer",
        ),
        ("bert", GPT2Tokenizer, r"model is 'WordPiece', but a GPT-2 tokenizer has BPE; gpt2rt.AutoTokenizer"),
        ("any", GPT2Tokenizer, r"normalizer is 'NFKC'.*gpt2rt.AutoTokenizer"),
        ("gpt1", GPT2Tokenizer, r"end_of_word_suffix = '</w>', but GPT-2's BPE does not use it"),
        ("gpt2", BertTokenizer, r"model is 'BPE', but a BERT tokenizer has WordPiece"),
        ("gpt2_old", BertTokenizer, r"has vocab.json, a BPE vocabulary; merges.txt, BPE merges; BertTokenizer needs"),
        ("gpt2_old", PreTrainedTokenizerFast, r"PreTrainedTokenizerFast needs tokenizer.json, or a SentencePiece"),
    ):
        with pytest.raises(TokenizerError, match=message):
            asked.from_pretrained(folders / name)
    for named in ("T5Tokenizer", "CpmTokenizer", "XLNetTokenizerFast"):
        write(folders / "any", tokenizer_config_json={"tokenizer_class": named})
        with pytest.raises(TokenizerError, match=rf"asks for '{named}', which gpt2rt does not have .*PreTrained"):
            AutoTokenizer.from_pretrained(folders / "any")
        assert PreTrainedTokenizerFast.from_pretrained(folders / "any").encode("a")
    write(folders / "bert_old", tokenizer_config_json={"tokenizer_class": "CpmTokenizer"})
    with pytest.raises(TokenizerError, match=r"asks for 'CpmTokenizer'.*tokenize with that class of transformers"):
        AutoTokenizer.from_pretrained(folders / "bert_old")
    with pytest.raises(CheckpointError, match="has no tokenizer"):
        AutoTokenizer.from_pretrained(write(folders / "nothing"))


@pytest.mark.proves("T13", "I14")
@pytest.mark.parametrize("named", ["GPT2Tokenizer", "GPT2TokenizerFast", "OpenAIGPTTokenizer", "BertTokenizer"])
def test_the_file_counts_when_the_name_is_wrong(folders, named):
    """Many checkpoints say GPT2Tokenizer, whatever their tokenizer.json holds."""
    write(folders / "any", tokenizer_config_json={"tokenizer_class": named, "bos_token": "<s>"})
    with pytest.warns(UserWarning, match=rf"names {named}, but tokenizer.json describes another tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(folders / "any")
    assert type(tokenizer) is PreTrainedTokenizerFast
    text = CORPUS[1]
    assert tokenizer.encode(text) == PreTrainedTokenizerFast.from_pretrained(folders / "any").encode(text)
    assert tokenizer.bos_token_id == 0


@pytest.mark.proves("T13", "I15")
def test_a_tokenizer_that_is_larger_than_the_model(folders):
    write(folders / "gpt2", config_json={"model_type": "gpt2", "vocab_size": 299})
    with pytest.warns(UserWarning, match="has 300 tokens, the model 299; ids from 299 on have no embedding"):
        AutoTokenizer.from_pretrained(folders / "gpt2")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        AutoTokenizer.from_pretrained(folders / "gpt2", config={"vocab_size": 300})
