"""The words of the OpenAI GPT paper: ftfy, a few replacements, spaCy's English tokenizer, lower case.

Source: Radford et al. 2018, "Improving Language Understanding by Generative Pre-Training", section 4.1, and the code
published with it (openai/finetune-transformer-lm, text_utils.py). The vocabulary was made from these words, so texts
with line breaks, quotes or contractions get the tokens that the model was trained on. Needs the extra ``openai-gpt``.
"""

import re
from typing import Any

_DASHES = str.maketrans({"—": "-", "–": "-", "―": "-", "…": "...", "´": "'"})
# runs of one of these marks become words of their own
_MARKS = re.compile(r'(~+|!+|"+|;+|\?+|\++|,+|\)+|\(+|\\+|/+|\*+|\[+|\]+|\}+|\{+|\|+|_+)')
_LINE_BREAKS = re.compile(r"\s*\n\s*")
_BLANKS = re.compile(r"[^\S\n]+")


def standardize(text: str) -> str:
    """Text with plain dashes and quotes, marks set apart, and each line break as one " \\n "."""
    text = _MARKS.sub(r" \1 ", text.translate(_DASHES))
    return _BLANKS.sub(" ", _LINE_BREAKS.sub(" \n ", text)).strip()


class PublishedWords:
    """Callable: text -> lower-case words, a line break being the word "\\n".

    Raises:
        ImportError: ftfy or spaCy is not installed.
    """

    def __init__(self) -> None:
        try:
            import ftfy
            from spacy.lang.en import English
        except ImportError as error:
            raise ImportError(
                "use_ftfy_spacy=True needs the packages ftfy and spacy; install them with "
                "pip install 'gpt2rt[openai-gpt]', or leave use_ftfy_spacy out"
            ) from error
        self._fix: Any = ftfy.fix_text
        # the rules of the language only, no trained model
        self._words: Any = English().tokenizer

    def __call__(self, text: str) -> list[str]:
        words = (token.text.lower() for token in self._words(standardize(self._fix(text))))
        # spaCy gives the line break together with the space after it; the vocabulary has the line break alone
        return ["\n" if word == "\n " else word for word in words]
