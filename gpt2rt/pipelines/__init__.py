"""Pipelines: from texts to results in one call, with transformers' names, keywords and results."""

from .base import Feature, Pipeline
from .factory import pipeline, supported_tasks
from .feature_extraction import FeatureExtractionPipeline
from .question_answering import QuestionAnsweringPipeline
from .seeding import set_seed
from .text_classification import TextClassificationPipeline, ZeroShotClassificationPipeline
from .text_generation import TextGenerationPipeline
from .token_classification import NerPipeline, TokenClassificationPipeline

__all__ = [
    "Feature",
    "FeatureExtractionPipeline",
    "NerPipeline",
    "Pipeline",
    "QuestionAnsweringPipeline",
    "TextClassificationPipeline",
    "TextGenerationPipeline",
    "TokenClassificationPipeline",
    "ZeroShotClassificationPipeline",
    "pipeline",
    "set_seed",
    "supported_tasks",
]
