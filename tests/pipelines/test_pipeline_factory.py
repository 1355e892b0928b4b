"""``gpt2rt.pipeline``: tasks, models, tokenizers, devices."""

import pytest
import torch

import gpt2rt
from gpt2rt import (
    FeatureExtractionPipeline,
    Pipeline,
    QuestionAnsweringPipeline,
    TextClassificationPipeline,
    TextGenerationPipeline,
    TokenClassificationPipeline,
    ZeroShotClassificationPipeline,
    pipeline,
)

TASKS = {
    "text-generation": (TextGenerationPipeline, "LMHeadModel"),
    "text-classification": (TextClassificationPipeline, "ForSequenceClassification"),
    "sentiment-analysis": (TextClassificationPipeline, "ForSequenceClassification"),
    "zero-shot-classification": (ZeroShotClassificationPipeline, "ForSequenceClassification"),
    "token-classification": (TokenClassificationPipeline, "ForTokenClassification"),
    "ner": (TokenClassificationPipeline, "ForTokenClassification"),
    "question-answering": (QuestionAnsweringPipeline, "ForQuestionAnswering"),
    "feature-extraction": (FeatureExtractionPipeline, "Model"),
}
INFERRED = {"zero-shot-classification": None, "sentiment-analysis": None, "ner": None}


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.filterwarnings("ignore:no label of the model begins with 'entail'")
def test_a_folder_and_objects(task, make_model, tokenizer, save, hf):
    kind, model_kind = TASKS[task]
    model = make_model(model_kind, dtype=torch.float32)
    folder = save(model, tokenizer)
    for pipe in (
        pipeline(task, model=str(folder)),
        pipeline(task, folder, batch_size=2),
        pipeline(task, model=model, tokenizer=tokenizer),
        pipeline(task, model=model, tokenizer=str(folder), device="cpu"),
        pipeline(task, model=folder, tokenizer=(str(folder), {"use_fast": True}), device=-1, dtype=torch.float32),
    ):
        assert type(pipe) is kind
        assert isinstance(pipe, Pipeline)
        assert type(pipe.model).__name__ == f"GPT2{model_kind}"
        assert not pipe.model.training
        assert (pipe.dtype, pipe.torch_dtype, pipe.framework) == (torch.float32, torch.float32, "pt")
        assert pipe.device == (pipe.model.device if pipe.model is model else torch.device(pipe.device))
        assert f"{kind.__name__}(task=" in repr(pipe)
        assert len(pipe.tokenizer) == len(tokenizer)


@pytest.mark.parametrize("task", [task for task in TASKS if task not in INFERRED])
def test_the_task_is_inferred(task, make_model, tokenizer, save):
    kind, model_kind = TASKS[task]
    model = make_model(model_kind)
    assert type(pipeline(model=save(model, tokenizer))) is kind
    assert type(pipeline(model=model, tokenizer=tokenizer)) is kind


def test_the_default_model():
    pipe = pipeline("text-generation", max_new_tokens=4, do_sample=False)
    [result] = pipe("ROMEO:")
    assert result["generated_text"].startswith("ROMEO:")
    assert len(result["generated_text"]) > 6
    for task in ("feature-extraction", "ner"):
        with pytest.raises(ValueError, match=r"pipeline got no model, and .* has no default"):
            pipeline(task)


def test_openai_gpt(test_data, tmp_path):
    tokenizer = gpt2rt.OpenAIGPTTokenizer.from_pretrained(test_data / "openai-gpt")
    tokenizer.save_pretrained(tmp_path)
    torch.manual_seed(0)
    config = gpt2rt.OpenAIGPTConfig(n_positions=64, n_embd=32, n_layer=2, n_head=4, initializer_range=0.3)
    gpt2rt.OpenAIGPTLMHeadModel(config).save_pretrained(tmp_path)
    pipe = pipeline("text-generation", model=tmp_path, do_sample=False, max_new_tokens=5)
    texts = ["the rain in the town", "Hello"]
    alone = [pipe(text) for text in texts]
    assert pipe(texts, batch_size=2) == alone
    assert alone[0][0]["generated_text"].startswith("the rain in the town")
    states = pipeline("feature-extraction", model=tmp_path)(texts, batch_size=2)
    assert [len(state[0][0]) for state in states] == [32, 32]
    config = gpt2rt.OpenAIGPTConfig(n_positions=64, n_embd=32, n_layer=2, n_head=4, num_labels=3)
    model = gpt2rt.OpenAIGPTForSequenceClassification(config).eval()
    pipe = pipeline("text-classification", model=model, tokenizer=tokenizer, top_k=None)
    alone = [pipe(text)[0] for text in texts]
    assert pipe(texts, batch_size=2) == alone


def test_model_kwargs(make_model, tokenizer, save):
    folder = save(make_model("LMHeadModel"), tokenizer)
    pipe = pipeline("text-generation", folder, model_kwargs={"dtype": "bfloat16", "attn_implementation": "eager"})
    assert pipe.dtype == torch.bfloat16
    assert pipeline("text-generation", folder, torch_dtype="bfloat16", local_files_only=True).dtype == torch.bfloat16
    config = pipe.model.config
    config.summary_first_dropout = 0.33
    assert pipeline("text-generation", folder, config=config).model.config.summary_first_dropout == 0.33
    assert (
        pipeline("text-generation", folder, config=str(folder), revision="main", device_map="cpu").device.type == "cpu"
    )


def test_save(make_model, tokenizer, tmp_path):
    pipe = pipeline("text-generation", model=make_model("LMHeadModel"), tokenizer=tokenizer)
    pipe.save_pretrained(tmp_path)
    again = pipeline(model=tmp_path)
    options = {"do_sample": False, "max_new_tokens": 4}
    assert again("the rain", **options) == pipe("the rain", **options)
    greedy = pipeline("text-generation", model=pipe.model, tokenizer=tokenizer, **options)
    assert greedy.transform(["on"]) == greedy.predict(["on"]) == greedy(["on"])


def test_refusals(make_model, tokenizer, save):
    model = make_model("LMHeadModel")
    folder = save(model, tokenizer)
    with pytest.raises(KeyError, match="Unknown task 'fill-mask', available tasks are feature-extraction, ner, quest"):
        pipeline("fill-mask", folder)
    with pytest.raises(ValueError, match="neither task nor model"):
        pipeline()
    with pytest.raises(ValueError, match="tokenizer or config was given without a model"):
        pipeline("text-generation", tokenizer=tokenizer)
    with pytest.raises(ValueError, match="which tokenizer it needs is unknown; pass tokenizer="):
        pipeline("text-generation", model=model)
    with pytest.raises(ValueError, match=r"cannot use a GPT2LMHeadModel; it needs .* ends in ForTokenClassification"):
        pipeline("ner", model=model, tokenizer=tokenizer)
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        pipeline("text-generation", folder, trust_remote_code=True)
    with pytest.raises(ValueError, match="framework = 'tf'"):
        pipeline("text-generation", folder, framework="tf")
    with pytest.raises(ValueError, match="dtype was given twice"):
        pipeline("text-generation", folder, dtype="float32", model_kwargs={"dtype": "float32"})
    with pytest.raises(ValueError, match="device and device_map were both given"):
        pipeline("text-generation", folder, device=-1, device_map="cpu")
    with pytest.raises(ValueError, match="dtype say how to load a model, but the model was given as an object"):
        pipeline("text-generation", model=model, tokenizer=tokenizer, dtype="float32")
    with pytest.raises(ValueError, match="image_processor is not supported"):
        pipeline("text-generation", folder, image_processor=object())
    for device in (-2, "moon", 1.5):
        with pytest.raises(ValueError, match=f"device = {device!r}"):
            pipeline("text-generation", model=model, tokenizer=tokenizer, device=device)
    with pytest.raises(OSError, match="does not exist"):
        pipeline("text-generation", "./no-such-folder")


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_a_device_that_is_not_there(make_model, tokenizer):
    with pytest.raises(ValueError, match="device = 'cuda:0', but torch sees 0 CUDA devices; use device=-1"):
        pipeline("text-generation", model=make_model("LMHeadModel"), tokenizer=tokenizer, device=0)
