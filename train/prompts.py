"""What a prompt must hold: the word that will name the subject.

DreamBooth binds a subject to a word that means nothing yet (Ruiz et al., 2023, section 3.2). Without such a word the
training photos overwrite the class itself: every dog becomes that dog. A program cannot know what a user means, so the
rule is short and its message says how to get around it:

1. a word named with `--subject_token` must be in the prompt;
2. otherwise, with a class prompt, the instance prompt must hold a word that the class prompt does not;
3. in both other cases, at least one word of the prompt must be outside a short list of everyday words.
"""

from __future__ import annotations

import re

from lora_diffusion.errors import ConfigError

# Words that describe a picture, its style or a usual class. Enough to catch a forgotten subject word; no dictionary.
EVERYDAY_WORDS = frozenset(
    """
    a an the this that my your his her its our their some one two three of in on at by with and or for from to near
    under over beside behind before after is are as it photo photograph picture image portrait painting drawing sketch
    render illustration art style shot closeup close up high quality best detailed beautiful nice old new young big
    small large little tiny huge tall short red orange yellow green blue purple violet pink brown black white grey gray
    gold silver striped dotted plain spotted checked round square left right top bottom middle background front dog cat
    puppy kitten animal creature bird horse cow sheep fish bear rabbit person man woman boy girl child baby people face
    toy doll figure teddy plush backpack bag shoe boot sneaker cup mug bowl bottle can vase clock watch glasses candle
    book chair table sofa lamp car truck bus bike bicycle boat ship plane train house home building tree flower plant
    food cake fruit apple ball box thing object subject robot monster star heart ring triangle circle beach forest snow
    city street room garden park mountain sea sky night day grass sand water road desert meadow kitchen floor wall wood
    """.split()  # noqa: SIM905
)


def words_of(prompt: str) -> list[str]:
    """The words of a prompt, lower case, without punctuation (`<sks>` is the word `sks`)."""
    return re.findall(r"\w+", prompt.lower())


def check_subject_word(instance_prompt: str, class_prompt: str | None, subject_token: str | None) -> None:
    """Check that the prompt holds a word for the subject (the rule is this module's docstring).

    Raises:
        ConfigError: the prompt has none.
    """
    words = words_of(instance_prompt)
    if subject_token is not None:
        if not set(words_of(subject_token)) <= set(words) or not words_of(subject_token):
            raise ConfigError(
                f"the instance prompt {instance_prompt!r} does not contain the subject word {subject_token!r} "
                "(--subject_token)"
            )
        return
    if class_prompt is not None:
        if words == words_of(class_prompt):
            raise ConfigError(
                f"the instance prompt and the class prompt are the same ({instance_prompt!r}); add a rare word for "
                "the subject to the instance prompt, such as 'a photo of sks dog'"
            )
        if not set(words) - set(words_of(class_prompt)):
            raise ConfigError(
                f"the instance prompt {instance_prompt!r} has no word that the class prompt {class_prompt!r} has not; "
                "add a rare word for the subject, such as 'sks'"
            )
    if not set(words) - EVERYDAY_WORDS:
        raise ConfigError(
            f"the instance prompt {instance_prompt!r} has no subject word, only everyday words; add a rare one, "
            "such as 'sks', or say with --subject_token which of its words is meant"
        )
