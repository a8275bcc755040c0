"""runpod_setup.sh run for real, on a pod made of stubs: no network, no root, no GPU.

The "image" is a small virtual environment with made-up torch, torchaudio, transformers and
huggingface_hub; apt-get, dpkg-query and nvidia-smi are scripts in front of PATH. Most tests give
the environment a pip that only writes down what it is asked; one uses the real pip, offline.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest

import praat
from tools import toy_voices

REPOSITORY = Path(__file__).resolve().parent.parent
PYTHON_FOLDER = f"python{sys.version_info.major}.{sys.version_info.minor}"

pytestmark = pytest.mark.skipif(
    not sys.platform.startswith("linux") or shutil.which("bash") is None,
    reason="needs Linux and bash",
)

TORCH = """
import types
__version__ = "{version}"
version = types.SimpleNamespace(cuda={cuda!r})
cuda = types.SimpleNamespace(
    is_available=lambda: {available},
    get_device_name=lambda index: "NVIDIA H200",
    get_device_properties=lambda index: types.SimpleNamespace(total_memory=139 * 2**30),
)
def compiled_with_cxx11_abi():
    return True
"""
HUGGING_FACE = """
import os, pathlib
from . import errors
STORE = pathlib.Path(os.environ["HF_HOME"], "token")
def get_token():
    return STORE.read_text() if STORE.exists() else None
def login(token, add_to_git_credential):
    if token == "bad":
        raise ValueError("Invalid token")
    STORE.parent.mkdir(parents=True, exist_ok=True)
    STORE.write_text(token)
class HfApi:
    def whoami(self):
        return {"name": "someone"}
def auth_check(name, repo_type):
    if name in os.environ.get("FAKE_GATED", "").split():
        raise errors.GatedRepoError(name)
"""
HUGGING_FACE_ERRORS = """
class RepositoryNotFoundError(Exception): pass
class GatedRepoError(RepositoryNotFoundError): pass
"""
# Writes down what it was asked; "installs" the made-up wheels it finds by exact version.
FAKE_PIP = """
import os, pathlib, sys, sysconfig, zipfile
arguments = sys.argv[1:]
with open(os.environ["PIP_CALLS"], "a") as calls:
    print(*arguments, file=calls)
for argument in arguments:
    if arguments[0] == "install" and ("==" in argument or argument.endswith(".whl")):
        wheels = pathlib.Path(os.environ["PIP_FIND_LINKS"])
        found = sorted(wheels.glob(argument.replace("==", "-") + "*"))
        if not found:
            sys.exit(1)
        zipfile.ZipFile(found[0]).extractall(sysconfig.get_path("purelib"))
"""


def package_files(name: str, version: str, modules: dict[str, str]) -> dict[str, str]:
    metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
    info = f"{name}-{version}.dist-info"
    wheel = "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    return {**modules, f"{info}/METADATA": metadata, f"{info}/WHEEL": wheel, f"{info}/RECORD": ""}


def torch_files(version: str, cuda: str | None = "12.8", available: bool = True) -> dict[str, str]:
    source = TORCH.format(version=version, cuda=cuda, available=available)
    return package_files("torch", version, {"torch/__init__.py": source})


def torchaudio_files(version: str) -> dict[str, str]:
    source = f"__version__ = {version!r}\n"
    return package_files("torchaudio", version, {"torchaudio/__init__.py": source})


def other_files() -> dict[str, str]:
    hub = {
        "huggingface_hub/__init__.py": HUGGING_FACE,
        "huggingface_hub/errors.py": HUGGING_FACE_ERRORS,
    }
    models = "__version__ = '4.57'\nclass WavLMModel: pass\nclass WhisperModel: pass\n"
    transformers = {"transformers/__init__.py": models}
    return {
        **package_files("huggingface_hub", "1.0", hub),
        **package_files("transformers", "4.57", transformers),
    }


def write_files(folder: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


def write_wheel(folder: Path, name: str, version: str, files: dict[str, str]) -> None:
    folder.mkdir(exist_ok=True)
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as archive:
        for path, text in files.items():
            archive.writestr(path, text)


def write_script(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("#!/bin/bash\n" + text)
    path.chmod(0o755)


class Pod:
    """A machine as the script sees it: image, clone, home and volume in one folder."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.environment = root / "workspace" / "venv"
        self.clone = root / "workspace" / "clone"
        self.site = root / "image" / "lib" / PYTHON_FOLDER / "site-packages"
        self.bashrc = root / "home" / ".bashrc"
        self.wheels = root / "wheels"
        self.extra: dict[str, str] = {}
        for folder in (self.clone, root / "home", self.wheels):
            folder.mkdir(parents=True)
        shutil.copy(REPOSITORY / "runpod_setup.sh", self.clone)
        shutil.copy(REPOSITORY / "requirements.txt", self.clone)
        image = [sys.executable, "-m", "venv", "--without-pip", root / "image"]
        subprocess.run(image, check=True)
        write_files(self.site, other_files())
        self.write_stubs()
        self.driver("580.65.06")
        write_wheel(self.wheels, "torch", "2.11.0", torch_files("2.11.0"))
        write_wheel(self.wheels, "torchaudio", "2.11.0", torchaudio_files("2.11.0"))

    def write_stubs(self) -> None:
        stubs, apt = self.root / "bin", self.root / "apt.log"
        apt.touch()
        write_script(
            stubs / "apt-get",
            f"[[ ! -e {self.root}/no-nvtop || $* != *nvtop* ]] || exit 100\n"
            f'echo "$*" >> {apt}\n',
        )
        write_script(
            stubs / "dpkg-query",
            f'grep -q -- " ${{@: -1}}\\( \\|$\\)" {apt} && echo "install ok installed"\n',
        )
        write_script(stubs / "sudo", 'shift; exec "$@"\n')
        write_script(stubs / "ffmpeg", "echo ffmpeg version 6.1\n")

    def driver(self, version: str | None) -> None:
        stub = self.root / "bin" / "nvidia-smi"
        stub.unlink(missing_ok=True)
        if version:
            write_script(stub, f"echo {version}\n")

    def image(self, *packages: dict[str, str]) -> None:
        for files in packages:
            write_files(self.site, files)

    def give_environment(self) -> None:
        """An environment as an earlier run left it, with the pip that only writes down."""
        image_python = self.root / "image" / "bin" / "python"
        subprocess.run([image_python, "-m", "venv", "--without-pip", self.environment], check=True)
        site = self.environment / "lib" / PYTHON_FOLDER / "site-packages"
        write_files(site, {"pip/__init__.py": "", "pip/__main__.py": FAKE_PIP})
        (site / "image.pth").write_text(f"{self.site}\n")

    def variables(self) -> dict[str, str]:
        return {
            "PATH": f"{self.root / 'bin'}:/usr/bin:/bin",
            "HOME": str(self.root / "home"),
            "LANG": "C.UTF-8",
            "PYTHON": str(self.root / "image" / "bin" / "python"),
            "SAMVAD_ENV": str(self.environment),
            "HF_HOME": str(self.root / "workspace" / "hf"),
            "PIP_CALLS": str(self.root / "pip.log"),
            "PIP_NO_INDEX": "1",
            "PIP_FIND_LINKS": str(self.wheels),
            **self.extra,
        }

    def shell(self, command: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["bash", "-c", command], env=self.variables(), cwd=self.root, text=True, timeout=120,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )

    def set_up(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return self.shell(" ".join(["bash", str(self.clone / "runpod_setup.sh"), *arguments]))

    def pip_calls(self) -> list[str]:
        log = self.root / "pip.log"
        return log.read_text().splitlines() if log.exists() else []

    def torch_call(self) -> str:
        return next(call for call in self.pip_calls() if "torchaudio==" in call)


@pytest.fixture
def pod(tmp_path: Path) -> Pod:
    machine = Pod(tmp_path)
    machine.give_environment()
    return machine


def good_pair(pod: Pod) -> None:
    pod.image(torch_files("2.8.0+cu128"), torchaudio_files("2.8.0+cu128"))


def test_shellcheck_is_clean() -> None:
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not installed (apt-get install shellcheck)")
    scripts = [REPOSITORY / "runpod_setup.sh", REPOSITORY / ".ci" / "run"]
    result = subprocess.run(["shellcheck", *scripts], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout


def test_help_and_unknown_option(pod: Pod) -> None:
    result = pod.set_up("--help")
    assert result.returncode == 0
    assert "WITH_FLASH_ATTN=1" in result.stdout and "set -euo" not in result.stdout
    result = pod.set_up("--gpu")
    assert result.returncode == 1
    assert result.stdout.startswith("error: unknown option --gpu")


def test_matching_image_torch_is_kept_and_a_second_run_changes_nothing(pod: Pod) -> None:
    good_pair(pod)
    pod.bashrc.write_text("echo before\n")
    first = pod.set_up()
    assert first.returncode == 0, first.stdout
    assert "keeping torch and torchaudio as they are: 2.8.0+cu128 2.8.0+cu128" in first.stdout
    requirements = str(pod.environment / "requirements.txt")
    assert [call.split()[-1] for call in pod.pip_calls()] == [requirements]
    held = (pod.environment / "keep-torch.txt").read_text()
    assert held == "torch==2.8.0+cu128\ntorchaudio==2.8.0+cu128\n"
    bashrc, apt = pod.bashrc.read_text(), (pod.root / "apt.log").read_text()

    second = pod.set_up()
    assert second.returncode == 0, second.stdout
    assert pod.bashrc.read_text() == bashrc
    assert (pod.root / "apt.log").read_text() == apt
    assert bashrc.startswith("echo before\n") and bashrc.count("# >>> samvad >>>") == 1


def test_hook_moves_behind_lines_that_the_pod_adds_later(pod: Pod) -> None:
    good_pair(pod)
    pod.set_up()
    with pod.bashrc.open("a") as bashrc:
        bashrc.write("source /etc/rp_environment\n")
    pod.set_up()
    assert pod.bashrc.read_text().splitlines()[0] == "source /etc/rp_environment"
    assert pod.bashrc.read_text().count("samvad.sh") == 2


def test_verification_table(pod: Pod) -> None:
    good_pair(pod)
    table = pod.set_up().stdout.split("step 4: what is here")[1].split("Ready.")[0]
    rows = dict(line.split()[:2] for line in table.splitlines() if line.startswith("  "))
    assert rows.pop("flash-attn") == "-"
    assert len(rows) == 9 and set(rows.values()) == {"ok"}, table
    assert "NVIDIA H200, 139 GiB" in table and "580.65.06" in table


def test_verification_fails_when_a_needed_part_is_missing(pod: Pod) -> None:
    good_pair(pod)
    (pod.site / "transformers" / "__init__.py").write_text("raise ImportError('broken')\n")
    result = pod.set_up()
    assert result.returncode == 1
    assert result.stdout.splitlines()[-1] == "error: not ready: teachers"


def test_old_driver_keeps_a_working_image_torch(pod: Pod) -> None:
    good_pair(pod)
    pod.driver("570.86.15")
    result = pod.set_up()
    assert result.returncode == 0, result.stdout
    assert "driver 570.86.15 is older than 580" in result.stdout
    assert not any("==" in call for call in pod.pip_calls())


@pytest.mark.parametrize(
    ("driver", "image", "index"),
    [
        ("580.65.06", [], None),
        ("580.65.06", [torch_files("2.6.0+cu126"), torchaudio_files("2.6.0+cu126")], None),
        ("570.86.15", [], "cu128"),
        ("570.86.15", [torch_files("2.9.1+cu130", "13.0", False)], "cu128"),
        ("580.65.06", [torch_files("2.9.1+cpu", None, False)], None),
    ],
)
def test_unusable_torch_brings_the_pair_that_the_driver_can_run(
    pod: Pod, driver: str, image: list[dict[str, str]], index: str | None
) -> None:
    pod.driver(driver)
    pod.image(*image)
    result = pod.set_up()
    assert result.returncode == 0, result.stdout
    call = pod.torch_call()
    assert "torch==2.11.0 torchaudio==2.11.0" in call
    assert ("--index-url" in call) == (index is not None)
    assert index is None or call.endswith(f"https://download.pytorch.org/whl/{index}")
    assert (pod.environment / "keep-torch.txt").read_text().startswith("torch==2.11.0\n")


def test_missing_torchaudio_is_added_beside_a_working_torch(pod: Pod) -> None:
    pod.image(torch_files("2.9.1+cu128"))
    write_wheel(pod.wheels, "torchaudio", "2.9.1", torchaudio_files("2.9.1+cu128"))
    result = pod.set_up()
    assert result.returncode == 0, result.stdout
    call = pod.torch_call()
    assert "--no-deps torchaudio==2.9.1" in call and call.endswith("/whl/cu128")
    assert "torch==2.9.1+cu128" in (pod.environment / "keep-torch.txt").read_text()


def test_torch_too_new_for_any_torchaudio_is_shadowed_by_the_pair(pod: Pod) -> None:
    pod.image(torch_files("2.13.0+cu130", "13.0"))
    result = pod.set_up()
    assert result.returncode == 0, result.stdout
    assert "torchaudio has no release for torch 2.13.0+cu130" in result.stdout
    assert (pod.site / "torch-2.13.0+cu130.dist-info").exists()


@pytest.mark.parametrize(
    ("driver", "message"),
    [
        (None, "error: nvidia-smi finds no GPU here: rent a GPU pod, or add --cpu"),
        ("NVIDIA-SMI has failed", "error: nvidia-smi finds no GPU here"),
        ("470.256.02", "error: driver 470.256.02 is older than 525"),
    ],
)
def test_no_usable_driver_ends_in_one_line(pod: Pod, driver: str | None, message: str) -> None:
    pod.driver(driver)
    result = pod.set_up()
    assert result.returncode == 1
    assert result.stdout.splitlines()[-1].startswith(message)


def test_cpu_takes_the_cpu_builds_and_no_gpu(pod: Pod) -> None:
    pod.driver(None)
    pod.extra["WITH_FLASH_ATTN"] = "1"
    result = pod.set_up("--cpu")
    assert result.returncode == 0, result.stdout
    assert pod.torch_call().endswith("--index-url https://download.pytorch.org/whl/cpu")
    assert "not used (--cpu)" in result.stdout
    assert not any("flash_attn-" in call for call in pod.pip_calls())
    assert result.stdout.rstrip().endswith("runpod_setup.sh --cpu")


def test_no_token_shows_every_page_and_goes_on(pod: Pod) -> None:
    good_pair(pod)
    result = pod.set_up()
    assert result.returncode == 0
    assert "export HF_TOKEN=hf_..." in result.stdout
    for page in ("datasets/ai4bharat/IndicVoices", "google/gemma-3-1b-pt"):
        assert f"to check     https://huggingface.co/{page}" in result.stdout


def test_token_logs_in_and_gated_licences_are_named(pod: Pod) -> None:
    good_pair(pod)
    pod.extra.update(HF_TOKEN="hf_secret", FAKE_GATED="ai4bharat/Kathbath google/gemma-3-1b-pt")
    result = pod.set_up()
    assert result.returncode == 0 and "logged in as someone" in result.stdout
    assert "TO ACCEPT    https://huggingface.co/datasets/ai4bharat/Kathbath" in result.stdout
    assert "TO ACCEPT    https://huggingface.co/google/gemma-3-1b-pt" in result.stdout
    assert "accepted     https://huggingface.co/datasets/ARTPARK-IISc/Vaani" in result.stdout
    assert "hf_secret" not in result.stdout
    # The token stays on the volume: later runs are logged in without it.
    del pod.extra["HF_TOKEN"]
    assert "logged in as someone" in pod.set_up().stdout


def test_refused_token_is_one_line_and_the_set_up_goes_on(pod: Pod) -> None:
    good_pair(pod)
    pod.extra["HF_TOKEN"] = "bad"
    result = pod.set_up()
    assert result.returncode == 0
    assert "the login did not work (ValueError)" in result.stdout
    assert "Traceback" not in result.stdout


def test_flash_attn_asks_for_the_exact_wheel_and_goes_on_without(pod: Pod) -> None:
    good_pair(pod)
    pod.extra["WITH_FLASH_ATTN"] = "1"
    result = pod.set_up()
    assert result.returncode == 0, result.stdout
    call = next(call for call in pod.pip_calls() if "flash_attn-" in call)
    tag = f"cp{sys.version_info.major}{sys.version_info.minor}"
    assert call.endswith(f"+cu12torch2.8cxx11abiTRUE-{tag}-{tag}-linux_x86_64.whl")
    assert "--no-deps --only-binary :all:" in call
    assert "going on without it" in result.stdout


def test_one_unknown_debian_package_does_not_lose_the_others(pod: Pod) -> None:
    good_pair(pod)
    (pod.root / "no-nvtop").touch()
    result = pod.set_up()
    assert result.returncode == 0
    assert "not installed: nvtop (apt-get install nvtop)" in result.stdout
    assert "libportaudio2" in (pod.root / "apt.log").read_text()


def test_a_folder_with_something_else_is_refused(pod: Pod) -> None:
    good_pair(pod)
    pod.extra["SAMVAD_ENV"] = str(pod.root / "home" / "papers")
    (pod.root / "home" / "papers").mkdir()
    (pod.root / "home" / "papers" / "thesis.tex").write_text("mine")
    result = pod.set_up()
    assert result.returncode == 1
    assert "holds something else: choose another folder with SAMVAD_ENV=..." in result.stdout
    assert (pod.root / "home" / "papers" / "thesis.tex").read_text() == "mine"


def test_sourced_it_switches_this_shell_and_leaves_it_alive(pod: Pod) -> None:
    good_pair(pod)
    script = pod.clone / "runpod_setup.sh"
    result = pod.shell(f"source {script} >/dev/null; false; echo $-; command -v python")
    flags, python = result.stdout.splitlines()[-2:]
    assert "e" not in flags and python == str(pod.environment / "bin" / "python")
    pod.driver(None)
    result = pod.shell(f"source {script}; echo still here $?")
    assert result.stdout.splitlines()[-1] == "still here 1"


def test_new_interactive_shell_uses_the_environment(pod: Pod) -> None:
    good_pair(pod)
    pod.set_up()
    result = pod.shell("bash -ic 'command -v python; command -v pip3; echo $HF_HOME' 2>/dev/null")
    assert result.stdout.splitlines()[0] == str(pod.environment / "bin" / "python")
    assert result.stdout.splitlines()[-1] == str(pod.root / "workspace" / "hf")


@pytest.mark.skipif(shutil.which("tmux") is None, reason="needs tmux (apt-get install tmux)")
def test_new_tmux_pane_uses_the_environment(pod: Pod) -> None:
    good_pair(pod)
    pod.set_up()
    answer = pod.root / "pane.txt"
    tmux = f"SHELL=/bin/bash tmux -S {pod.root}/tmux"
    try:
        pod.shell(f"{tmux} new-session -d && {tmux} send-keys 'command -v python > {answer}' Enter")
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline and not (answer.exists() and answer.read_text()):
            time.sleep(0.1)
        assert answer.read_text().strip() == str(pod.environment / "bin" / "python")
    finally:
        pod.shell(f"{tmux} kill-server")


def test_real_pip_holds_the_image_torch_and_a_new_python_rebuilds(tmp_path: Path) -> None:
    pod = Pod(tmp_path)
    good_pair(pod)
    write_wheel(pod.wheels, "little", "1.0", package_files("little", "1.0", {"little.py": ""}))
    requirements = "torch>=2.8\ntorchaudio>=2.8\nlittle\ntransformers\n"
    (pod.clone / "requirements.txt").write_text(requirements)
    result = pod.set_up()
    assert result.returncode == 0, result.stdout
    assert "building it on" in result.stdout
    pip = f"{pod.environment}/bin/pip"
    again = pod.shell(f"{pip} install -r {pod.clone}/requirements.txt")
    assert again.returncode == 0, again.stdout
    assert pod.shell(f"{pip} install torch==2.11.0").returncode != 0
    probe = "import torch, little; print(torch.__version__)"
    seen = pod.shell(f"{pod.environment}/bin/python -c '{probe}'")
    assert seen.stdout.strip() == "2.8.0+cu128"

    # The pod came back with another Python: the environment's link leads nowhere.
    (pod.environment / "bin" / "python").unlink()
    os.symlink("/nowhere/python", pod.environment / "bin" / "python")
    result = pod.set_up()
    assert result.returncode == 0, result.stdout
    assert "building it on" in result.stdout


def test_requirements_take_the_same_pair_as_the_set_up() -> None:
    setup = (REPOSITORY / "runpod_setup.sh").read_text()
    pair = setup.split("torch_pair=")[1].split()[0]
    requirements = (REPOSITORY / "requirements.txt").read_text().splitlines()
    pins = [line for line in requirements if line.startswith("torch")]
    assert len(pins) == 2 and all(line.endswith(f"={pair}") for line in pins)


def test_the_set_up_brings_every_engine_of_the_toy() -> None:
    """Each names what it needs: a pod that was set up must lack none of it."""
    setup = (REPOSITORY / "runpod_setup.sh").read_text()
    packages = set(setup.split("debian_packages=(")[1].split(")\n")[0].split())
    wheels = {
        line.split(">")[0] for line in (REPOSITORY / "requirements.txt").read_text().splitlines()
    }
    ci = set((REPOSITORY / ".ci" / "run").read_text().split("packages=(")[1].split(")")[0].split())
    installs = {engine.name: engine.install for engine in toy_voices.SPEECH_ENGINES}
    for engine, how in {**installs, "praat": praat.INSTALL}.items():
        alternatives = [part.strip(" ()") for part in how.split(" (or ")]
        for line in alternatives:
            command, _, names = line.partition(" install ")
            have = wheels if command == "pip" else packages
            assert set(names.split()) <= have, f"{engine}: {line}"
            assert command == "pip" or set(names.split()) <= ci, f"{engine}: {line}"
