"""GPT-2's alphabet for bytes: each of the 256 bytes written as one printable character.

Source: Radford et al. 2019, "Language Models are Unsupervised Multitask Learners", section 2.2. The vocabulary files
hold tokens in this alphabet, so that JSON and the merges file need no escapes: the space is "Ġ", the newline "Ċ".
"""

from functools import cache


@cache
def byte_to_char() -> dict[int, str]:
    """Byte -> character: printable Latin-1 stands for itself, the other 68 bytes count up from U+0100."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    table = {byte: chr(byte) for byte in printable}
    others = [byte for byte in range(256) if byte not in table]
    table.update({byte: chr(0x100 + i) for i, byte in enumerate(others)})
    return table


@cache
def char_to_byte() -> dict[str, int]:
    """Character -> byte, the inverse of :func:`byte_to_char`."""
    return {char: byte for byte, char in byte_to_char().items()}


def token_to_bytes(token: str) -> bytes:
    """The bytes that a vocabulary token stands for; a token outside the alphabet stands for its own UTF-8."""
    table = char_to_byte()
    try:
        return bytes([table[char] for char in token])
    except KeyError:
        return token.encode("utf-8", "replace")
