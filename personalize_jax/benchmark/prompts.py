"""The prompts of the benchmarks, 25 a subject; "[V]" stands for the identifier."""

from pathlib import Path

from personalize_jax.runtime.errors import UserError
from personalize_jax.subject.identifier import PLACEHOLDER
from personalize_jax.world.captions import prompt
from personalize_jax.world.scene import ACCESSORIES, CLASSES_WITH_HEAD, CONTEXTS

# As in the dataset's prompts_and_classes.txt, with the class noun in place of {}.
_FOR_ALL = (
    "a [V] {} in the jungle",
    "a [V] {} in the snow",
    "a [V] {} on the beach",
    "a [V] {} on a cobblestone street",
    "a [V] {} on top of pink fabric",
    "a [V] {} on top of a wooden floor",
    "a [V] {} with a city in the background",
    "a [V] {} with a mountain in the background",
    "a [V] {} with a blue house in the background",
    "a [V] {} on top of a purple rug in a forest",
)
_PROPERTIES = (
    "a red [V] {}",
    "a purple [V] {}",
    "a shiny [V] {}",
    "a wet [V] {}",
    "a cube shaped [V] {}",
)
OBJECT_PROMPTS = (
    *_FOR_ALL,
    "a [V] {} with a wheat field in the background",
    "a [V] {} with a tree and autumn leaves in the background",
    "a [V] {} with the Eiffel Tower in the background",
    "a [V] {} floating on top of water",
    "a [V] {} floating in an ocean of milk",
    "a [V] {} on top of green grass with sunflowers around it",
    "a [V] {} on top of a mirror",
    "a [V] {} on top of the sidewalk in a crowded street",
    "a [V] {} on top of a dirt road",
    "a [V] {} on top of a white rug",
    *_PROPERTIES,
)
LIVE_PROMPTS = (
    *_FOR_ALL,
    "a [V] {} wearing a red hat",
    "a [V] {} wearing a santa hat",
    "a [V] {} wearing a rainbow scarf",
    "a [V] {} wearing a black top hat and a monocle",
    "a [V] {} in a chef outfit",
    "a [V] {} in a firefighter outfit",
    "a [V] {} in a police outfit",
    "a [V] {} wearing pink glasses",
    "a [V] {} wearing a yellow shirt",
    "a [V] {} in a purple wizard outfit",
    *_PROPERTIES,
)
LIVE_CLASSES = ("cat", "dog")


def dreambooth_prompts(class_noun: str) -> tuple[str, ...]:
    """The 25 prompts of the DreamBooth dataset for live subjects or for objects, whichever the class is."""
    templates = LIVE_PROMPTS if class_noun in LIVE_CLASSES else OBJECT_PROMPTS
    return tuple(template.format(class_noun) for template in templates)


def read_prompts(source: str, class_noun: str) -> tuple[str, ...]:
    """Read the prompts that a configuration names.

    Args:
        source: "world", "dreambooth", or a text file with one prompt a line.
        class_noun: the subject's class noun; in a file, {} stands for it.

    Raises:
        UserError: the file cannot be read or is empty.
    """
    if source in (lists := {"world": world_prompts, "dreambooth": dreambooth_prompts}):
        return lists[source](class_noun)
    try:
        lines = Path(source).read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise UserError(
            f"{source} is no list of prompts ({error}); give world, dreambooth, or a file with one a line."
        ) from error
    prompts = tuple(line.strip().replace("{}", class_noun) for line in lines if line.strip())
    if not prompts:
        raise UserError(f"{source} is empty; write one prompt a line.")
    return prompts


def world_prompts(class_noun: str) -> tuple[str, ...]:
    """The 25 prompts of the rendered world for one of its classes: contexts, then changes of the subject.

    As in the paper, all subjects of a class share one list, so that a prompt's colour may be the subject's own.
    """
    has_head = class_noun in CLASSES_WITH_HEAD
    changes = [{"accessory": worn} for worn in ACCESSORIES[1:] if has_head]
    changes += [{"colour": colour} for colour in ("red", "purple", "yellow")]
    changes += [{"colour": colour} for colour in ("green", "blue", "pink") if not has_head]
    changes += [{"finish": "shiny"}]
    wordings = [*({"context": context} for context in CONTEXTS), *changes]
    return tuple(prompt(class_noun, identifier=PLACEHOLDER, **wording) for wording in wordings)
