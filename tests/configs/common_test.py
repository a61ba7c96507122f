"""Selection by --config=FAMILY:VARIANT,DATA,RECIPE, and the commands in documents."""

import pathlib
import re

import pytest

from configs import cfmz, common, igcnets, xdensenet
from tests.support.families import FAMILIES

ROOT = pathlib.Path(__file__).parents[2]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
CONFIG = re.compile(r"(?<!tests/)configs/([a-z_]+)\.py(?::([\w.,-]+))?")


def test_empty_choices_are_the_defaults():
    assert cfmz.get_config("20,cifar10,faithful") == cfmz.get_config()
    assert cfmz.get_config(",,modern").recipe == "modern"


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("20,cifar10,moderne", r"recipe 'moderne'.*faithful, modern.*'modern'\?"),
        ("21", "variant '21'.*20, 32, 44"),
        ("20,cifar", "data set 'cifar'.*cifar10, cifar100.*--config.data.name"),
        ("20,cifar10,modern,fast", "4 parts, expected variant,data,recipe"),
    ],
)
def test_unknown_choices_are_rejected_with_the_known_ones(argument, message):
    with pytest.raises(ValueError, match=message):
        cfmz.get_config(argument)


def test_a_mirrored_digit_is_not_a_training_image():
    assert xdensenet.get_config("22-8-2,digits").data.flip is False
    assert igcnets.get_config("plain-20-L24M2,svhn_cropped").data.flip is False
    assert xdensenet.get_config("40-24-2,cifar100").data.flip is True


def test_the_recipe_carries_the_normalisation_of_its_data_set():
    data = xdensenet.get_config("40-24-2,cifar100").data
    assert data.recipe.name == "cifar100"
    assert (data.recipe.mean, data.recipe.std) == (
        (129.3, 124.1, 112.4),
        (68.2, 65.4, 70.4),
    )
    assert data.mean == data.std == ()  # free for the user


@pytest.mark.parametrize("family", FAMILIES)
def test_commands_in_docstrings_select_a_variant(family):
    command = r"^python main\.py --config=(\S+) --workdir=/tmp/run$"
    commands = re.findall(command, FAMILIES[family].__doc__, re.MULTILINE)
    assert commands[0] == f"configs/{family}.py"  # the default
    for name in commands:
        module, argument = CONFIG.fullmatch(name).groups()
        assert FAMILIES[module].get_config(argument or "").variant
        assert module == family


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_documents_name_existing_variants_and_fields(path):
    text = path.read_text()
    for family, argument in CONFIG.findall(text):
        if family not in ("common", "data_sets"):
            FAMILIES[family].get_config(argument.rstrip(".,"))
    configs = [common.base(), *(module.get_config() for module in FAMILIES.values())]
    fields = {name for config in configs for name in _names(config)}
    assert {*re.findall(r"--config\.([a-z][\w.]*)=", text)} <= fields


def _names(config, prefix=""):
    for name, value in config.items():
        yield prefix + name
        if hasattr(value, "items"):
            yield from _names(value, f"{prefix}{name}.")
