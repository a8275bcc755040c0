"""The phone inventory, and text to phones by espeak's rules, for English, Hindi and Telugu.

What knows of phones but makes no speech imports this: the codec's phone head, the dialogue LM's
labels, the judges of replies. Needs espeak's library for text alone: `INSTALL`.
"""

import contextlib
import ctypes
import functools
import os
import re
import threading
import unicodedata

from command import UserError

INSTALL = "pip install espeakng-loader (or apt-get install espeak-ng)"
SILENCE = "_"
JOINERS = "\u200c\u200d"  # ZWNJ and ZWJ: they shape letters within a word, and are no border of it
_STOPS = re.escape(".,!?;:\"'()-")


def split_symbols(text: str) -> tuple[str, ...]:
    return tuple(text.split())


# Length stays where it changes quality (a/aː); elsewhere short and long fold into the pairs
# ɪ/i and ʊ/u. Nasal vowels are a vowel and ŋ; r-coloured diphthongs are a vowel and ɹ.
VOWELS = split_symbols("i ɪ e ɛ æ a aː ɑ ɔ o ʊ u ʌ ə ɚ eɪ aɪ ɔɪ aʊ oʊ")
CONSONANTS = split_symbols("p b t d ʈ ɖ k ɡ tʃ dʒ m n ɳ ɲ ŋ f v θ ð s z ʃ ʒ h ɹ r ɽ l ɭ j w ʋ "
                           "pʰ bʰ tʰ dʰ ʈʰ ɖʰ kʰ ɡʰ tʃʰ dʒʰ ɽʰ")  # fmt: skip
PHONES: tuple[str, ...] = (SILENCE, *VOWELS, *CONSONANTS)

_ESPEAK_UNITS = {**{phone: phone for phone in (*VOWELS, *CONSONANTS)},
    "iː": "i", "ᵻ": "ɪ", "ɨ": "ɪ", "eː": "e", "ɛː": "ɛ", "æː": "æ", "ɑː": "ɑ", "ɒ": "ɑ", "ɔː": "ɔ",
    "oː": "o", "uː": "u", "ʉ": "u", "ʉː": "u", "ʌː": "ʌ", "ɐ": "ə", "əː": "ɚ", "ɜː": "ɚ", "ɜ": "ɚ",
    "ɝ": "ɚ", "ɞ": "ɚ", "ɵ": "ʊ", "əʊ": "oʊ", "ɔʊ": "oʊ", "ɐɪ": "aɪ", "ʌɪ": "aɪ", "ʌʊ": "aʊ",
    "ɛɪ": "eɪ", "oɪ": "ɔɪ", "aɔ": "aʊ", "əɪ": "aɪ", "eəɹ": "ɛ ɹ", "eə": "ɛ ə", "iə": "i ə",
    "ɪə": "ɪ ə", "ʊə": "ʊ ə", "oːɹ": "ɔ ɹ", "oɹ": "ɔ ɹ", "oə": "ɔ ə", "aɪə": "aɪ ə", "aʊə": "aʊ ə",
    "əl": "ə l", "l̩": "ə l", "ən": "ə n", "n̩": "ə n", "m̩": "ə m", "ɚː": "ɚ", "aɪʊ": "aɪ ʊ",
    "ɜːɹ": "ɚ", "əɹ": "ɚ", "ɪː": "i", "ʊː": "u", "ɾ": "t", "ʔ": "t", "g": "ɡ", "ɫ": "l", "ɬ": "l",
    "ʍ": "w", "x": "kʰ", "q": "k", "ɣ": "ɡ", "ç": "h", "ɦ": "h", "t̪": "t", "d̪": "d", "t̪ʰ": "tʰ",
    "d̪ʰ": "dʰ", "c": "tʃ", "ɟ": "dʒ", "cʰ": "tʃʰ", "ɟʰ": "dʒʰ", "ʂ": "ʃ", "ɕ": "ʃ", "ʑ": "ʒ",
    "ʲ": "j", "tʲ": "t", "r.": "ɽ", "r.ʰ": "ɽʰ", "ɽ̥": "ɽ", "ɻ": "ɹ", "ɸ": "f", "β": "ʋ", "ʋ̃": "ʋ",
    "n̪": "n", "ŋ̩": "ŋ", "rʲ": "r", "ʎ": "l", "ɴ": "ŋ"}  # fmt: skip
# Telugu writes short vowels that Hindi and English folds would confuse with the long ones.
_ESPEAK_BY_LANGUAGE = {"telugu": {"i": "ɪ", "u": "ʊ", "ɾ": "r"},
    "hindi": {"ʌ": "ə", "a": "ə", "i": "ɪ", "u": "ʊ", "ɾ": "r", "v": "ʋ"}}  # fmt: skip
_ESPEAK_LANGUAGE = {"english": "en-us", "hindi": "hi", "telugu": "te"}
_LONG_TOKEN = sorted(_ESPEAK_UNITS, key=len, reverse=True)


def fold_ipa(symbol: str, language: str, unknown: list[str] | None = None) -> list[str]:
    """An IPA symbol of espeak's as phones, the longest known piece first; `unknown` ones apart."""
    nasal = "\u0303" in symbol
    symbol = re.sub("[\u0303ˈˌ͡|‿'^*!?%\\d\\s-]", "", symbol)
    units = _ESPEAK_UNITS | _ESPEAK_BY_LANGUAGE.get(language, {})
    phones: list[str] = []
    while symbol:
        piece = next(filter(symbol.startswith, _LONG_TOKEN), None)
        if piece is None and unknown is not None and symbol[0] not in "ː.ʰ":
            unknown.append(symbol)
        phones += units[piece].split() if piece else []
        symbol = symbol[len(piece or symbol[0]) :]
    if nasal and phones and phones[-1] in VOWELS:
        phones.append("ŋ")
    return phones


def phonemize(text: str, language: str) -> list[str]:
    """Text -> phones of `PHONES`, by espeak's rules, without silences; UserError without espeak."""
    words = espeak().ipa(clean_text(text), espeak_language(language))
    return [phone for word in words for unit in word for phone in fold_ipa(unit, language)]


def clean_text(text: str) -> str:
    """Text without control characters and symbols no engine can say, and with simple quotes.
    Joiners stay within words; other characters of no width go without leaving a space."""
    simple = str.maketrans("’‘“”–—…।॥\\", "''\"\"--... ")
    text = unicodedata.normalize("NFC", text).translate(simple)
    clean = []
    for c in text:
        kind = unicodedata.category(c)
        if kind == "Cf":  # soft hyphens, marks of direction, joiners that join nothing
            if c in JOINERS and clean and unicodedata.category(clean[-1])[0] in "LMN":
                clean.append(c)
        else:
            clean.append(c if kind[0] in "LMNPZ" or c in "%$+=" else " ")
    text = re.sub(f"[{JOINERS}]+(?=[\\s{_STOPS}]|$)", "", "".join(clean))
    # A final anusvara is m in Telugu (namaskaaram); espeak would say n.
    text = re.sub(f"\u0c02(?![{JOINERS}]*\\w)", "\u0c2e\u0c4d", text)
    return re.sub(r"\s+", " ", text).strip()


def without_joiners(text: str) -> str:  # some engines take one for the end of a word
    return text.translate(dict.fromkeys(map(ord, JOINERS)))


def espeak_language(language: str) -> str:
    if language not in _ESPEAK_LANGUAGE:
        raise UserError(f"no voice speaks {language!r}: there are {', '.join(_ESPEAK_LANGUAGE)}")
    return _ESPEAK_LANGUAGE[language]


class Espeak:
    """libespeak-ng. It holds one state a process: every call is made under `lock`."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.load()

    def load(self) -> None:
        """Loads the library, whose rate of samples (Hz) becomes `rate`."""
        self.library, data = _espeak_library()
        # Synchronous output to a callback; phoneme events in IPA; never exit() on errors.
        self.rate = self.library.espeak_Initialize(2, 0, data, 1 | 2 | 0x8000)
        if self.rate <= 0:
            raise UserError(f"espeak has no data: {INSTALL}")
        self.library.espeak_TextToPhonemes.restype = ctypes.c_char_p

    def set_voice(self, name: str) -> None:
        if self.library.espeak_SetVoiceByName(name.encode()) != 0:
            raise UserError(f"espeak has no voice {name!r}: see espeak-ng --voices")

    def ipa(self, text: str, name: str) -> list[list[str]]:
        """Words of IPA symbols, stress marks included."""
        with self.lock:
            self.set_voice(name)
            pointer = ctypes.c_char_p(without_joiners(text).encode())
            words: list[list[str]] = []
            while pointer.value:
                mode = 0x02 | (ord("_") << 8)
                said = self.library.espeak_TextToPhonemes(ctypes.byref(pointer), 1, mode)
                for word in re.sub(r"\([a-z-]+\)", " ", said.decode()).split():
                    words.append([unit for unit in word.split("_") if unit])
        return words


def _espeak_library() -> tuple[ctypes.CDLL, bytes | None]:
    """The wheel's library before Debian's: then every machine makes the same phones."""
    with contextlib.suppress(ImportError, OSError):
        import espeakng_loader

        path, data = espeakng_loader.get_library_path(), espeakng_loader.get_data_path()
        return ctypes.CDLL(str(path)), os.path.dirname(str(data)).encode()
    try:
        return ctypes.CDLL("libespeak-ng.so.1"), None
    except OSError as error:
        raise UserError(f"espeak is not installed: {INSTALL}") from error


# The library, loaded on first use. UserError where it is not installed.
espeak = functools.lru_cache(maxsize=1)(Espeak)
