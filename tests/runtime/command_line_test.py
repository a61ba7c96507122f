"""Config files and override paths that cannot work, and the runs of several seeds."""

import pytest

from configs import xdensenet
from input_pipeline import Facts
from runtime import command_line
from runtime.workdir import save_config
from tests.support.words import words

# --config, and words that the message must contain.
FILES = {
    "configs/xdensenet.py:40-25-2": "'40-25-2' 40-24-2, did you mean",
    "configs/xdensenet.py:40-24-2,cifa10": "'cifa10' cifar10 digits",
    "configs/xdensnet.py": "configs/xdensnet.py exist configs/xdensenet.py?",
    "configs": "configs directory",
    "": "exist",
    "README.md": "README.md Python get_config()",
    "Makefile": "Makefile Python get_config()",
    "configs/common.py": "configs/common.py get_config",
}
# A config file's text, and words.
BAD_FILES = {
    "def get_config(:": "SyntaxError",
    "import nowhere": "ModuleNotFoundError nowhere",
    "def get_config():\n    return 1 / 0": "ZeroDivisionError",
    "def get_config():\n    return {}": "get_config() dict ConfigDict",
    "def get_config():\n    pass": "get_config() NoneType ConfigDict",
    "def other():\n    pass": "get_config",
    "\0": "",
}
PATHS = {
    "train.batchsize": "'batchsize' train.batch_size (int)?",
    "traim.batch_size": "'traim' train.batch_size (int)?",
    "train.batch_size.x": "train.batch_size int sub-fields",
    "train.dtype.x": "train.dtype str sub-fields",
    "optimizer.drop_epochs[0]": "optimizer.drop_epochs[0] whole optimizer.drop_epochs=",
    "data.mean[0]": "data.mean[0] whole data.mean=",
    "data": "data section data.name",
    "net.wiring": "net.wiring section net.wiring.kind",
    "net.primary_groups": "'primary_groups' net.wiring.primary_groups (int)?",
    "net.compress": "'compress' net.wiring.compress (int)?",
    "": "''",
    "train.": "''",
    "train..batch_size": "''",
    "quite.other": "'quite' configs/common.py",
}


@pytest.mark.parametrize("value", FILES)
def test_a_config_that_cannot_be_loaded(value):
    with pytest.raises(ValueError, match=words(FILES[value])):
        command_line.load_config_file(value)


@pytest.mark.parametrize("text", BAD_FILES)
def test_errors_in_a_user_config(tmp_path, text):
    path = tmp_path / "own.py"
    path.write_text(text)
    with pytest.raises(ValueError, match=words(f"{path} {BAD_FILES[text]}")):
        command_line.load_config_file(str(path))


def test_the_line_of_a_mistake_is_named(tmp_path):
    path = tmp_path / "own.py"
    path.write_text(
        "from configs import xdensenet\n"
        "def get_config():\n"
        "    config = xdensenet.get_config()\n"
        "    config.train.epochs = '1'\n"
    )
    with pytest.raises(ValueError, match=words(f"{path} line 4 'epochs' float")):
        command_line.load_config_file(str(path))


def test_the_config_of_a_run_can_be_used_again(tmp_path):
    config = xdensenet.get_config()
    facts = Facts(("a", "b"), (32, 32, 3), (0.0,) * 3, (1.0,) * 3, 9)
    save_config(tmp_path, config, facts)
    path = tmp_path / "config.json"
    assert command_line.load_config_file(str(path)) == config
    path.write_text("{")
    with pytest.raises(ValueError, match=words(f"{path} read")):
        command_line.load_config_file(str(path))


def test_a_user_config(tmp_path):
    path = tmp_path / "own.py"
    path.write_text(
        "from configs import xdensenet\n"
        "def get_config(variant='22-8-2,digits'):\n"
        "    return xdensenet.get_config(variant)\n"
    )
    assert command_line.load_config_file(str(path)).variant == "22-8-2"
    assert command_line.load_config_file(f"{path}:40-24").variant == "40-24"


@pytest.mark.parametrize("path", PATHS)
def test_an_unknown_override(path):
    with pytest.raises(ValueError, match=words(f"--config.{path} {PATHS[path]}")):
        command_line.check_path(xdensenet.get_config(), path)


def test_every_field_can_be_overridden():
    config = xdensenet.get_config()
    for path in command_line.flatten(config):
        command_line.check_path(config, path)


def test_a_missing_config_is_named_by_a_path_that_works(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        ValueError, match=words("did you mean /configs/cfmz.py")
    ) as error:
        command_line.load_config_file("configs/cfmz.py")
    path = str(error.value).rpartition(" ")[2].rstrip("?")
    assert command_line.load_config_file(path).variant == "20"


def test_without_config_the_runs_of_a_workdir_are_named(tmp_path):
    path = tmp_path / "seed1" / "config.json"
    path.parent.mkdir()
    path.write_text("{}")
    with pytest.raises(SystemExit, match=words(f"--config {path.parent} --help")):
        command_line.parse(["main.py", f"--workdir={tmp_path}"])


def test_a_module_is_named_as_it_was_started():
    path = command_line.CONFIGS.parent / "analysis" / "connectivity.py"
    with pytest.raises(SystemExit, match=r"missing.* python -m analysis\.connectivity"):
        command_line.parse([str(path)])
