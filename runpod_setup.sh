#!/usr/bin/env bash
# Sets up a rented pod for Samvad: the plan's RunPod steps 1 to 5 in one line that may be pasted again.
#
#   source runpod_setup.sh           set up, and use the environment in this shell at once
#   bash runpod_setup.sh             set up; the last line says how to use it in this shell
#   ... --cpu                        for a machine without a GPU: PyTorch's CPU builds
#   ... --help                       this text
#
# What it reads from the shell (export them first):
#   HF_TOKEN=hf_...                  logs in to Hugging Face and checks every gated licence
#   WITH_FLASH_ATTN=1                adds flash-attn, only as a ready-made wheel, never compiled
#   FLASH_ATTN_WHEEL=URL             that wheel from elsewhere than flash-attention's own releases
#   SAMVAD_ENV=/workspace/venv       where the environment lives; keep it on the volume that stays
#   PYTHON=python3.12                the interpreter to build it on (else: the one with the image's torch)
#
# The image's torch and torchaudio are kept where they match each other, are 2.8 or newer and reach
# the GPU; pip in the environment is held to them. Otherwise the pair 2.11.0 goes into the environment;
# the image's own files are never touched. After a pod was stopped only /workspace is left: paste the
# line again, it finds the environment there and takes seconds.

# Sourced: do the work in a child, so that its strictness and its exits do not reach this shell.
if [[ "${BASH_SOURCE[0]}" != "$0" ]]; then
    bash "${BASH_SOURCE[0]}" "$@" || return
    # shellcheck source=/dev/null
    [[ ! -f "${SAMVAD_ENV:-/workspace/venv}/samvad.sh" ]] || source "${SAMVAD_ENV:-/workspace/venv}/samvad.sh"
    return
fi

set -euo pipefail

here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
environment="$(realpath -m "${SAMVAD_ENV:-/workspace/venv}")"
env_python="$environment/bin/python"
readonly here environment env_python
readonly torch_pair=2.11.0             # torchaudio's last release; requirements.txt names the same
readonly cuda13_driver=580             # oldest driver of the pair's default build (CUDA 13)
readonly cuda12_driver=525             # oldest driver of its CUDA 12.8 build
readonly pytorch_index=https://download.pytorch.org/whl
readonly debian_packages=(
    ffmpeg git vim tmux htop nvtop wget curl build-essential libsndfile1 sox screen nano unzip p7zip-full
    libportaudio2 espeak-ng python3-venv
    # Phase 3: the users' voices (GPL, LGPL and BSD-like; the agent's engine is in requirements.txt).
    flite festival festvox-kallpc16k festvox-kdlpc16k festvox-us-slt-hts festvox-hi-nsk festival-hi
    festvox-te-nsk festival-te festvox-czech-dita festvox-czech-krb festvox-czech-machac
    festvox-czech-ph festvox-italp16k festvox-itapc16k festvox-suopuhe-lj festvox-suopuhe-mv)
cpu=0

fail() { echo "error: $*" >&2; exit 1; }
say() { echo "== $*"; }

pip_install() {
    echo "+ pip install $*"
    "$env_python" -m pip install --quiet --disable-pip-version-check "$@"
}

usage() { sed -n '2,/^$/s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; }

parse_arguments() {
    local argument
    for argument in "$@"; do
        case "$argument" in
            --cpu) cpu=1 ;;
            -h | --help) usage; exit 0 ;;
            *) fail "unknown option $argument: see bash runpod_setup.sh --help" ;;
        esac
    done
}

# ---- the driver ------------------------------------------------------------------------------------

# Prints nothing where there is no GPU; a broken driver makes nvidia-smi talk on stdout.
driver_version() {
    nvidia-smi --query-gpu=driver_version --format=csv,noheader 2>/dev/null | grep -m 1 -E '^[0-9]+\.' || true
}

check_driver() {
    [[ "$cpu" == 1 ]] && return
    driver="$(driver_version)"
    [[ -n "$driver" ]] || fail "nvidia-smi finds no GPU here: rent a GPU pod, or add --cpu"
    if ((${driver%%.*} < cuda13_driver)); then
        say "driver $driver is older than $cuda13_driver, which torch $torch_pair's CUDA 13 build needs:" \
            "the image's own torch is kept if it works, else the CUDA 12.8 build is taken"
    fi
}

# ---- step 1: Debian packages -----------------------------------------------------------------------

missing_packages() {
    local package
    for package in "${debian_packages[@]}"; do
        [[ "$(dpkg-query -W -f='${Status}' "$package" 2>/dev/null)" == *"ok installed" ]] || echo "$package"
    done
}

as_root() { if [[ "$(id -u)" == 0 ]]; then "$@"; else sudo -n "$@"; fi }

apt_install() {
    as_root env DEBIAN_FRONTEND=noninteractive \
        apt-get install -y -qq --no-install-recommends "$@" </dev/null >/dev/null
}

install_debian_packages() {
    say "step 1: Debian packages"
    local missing package
    command -v apt-get >/dev/null || { echo "no apt-get: install yourself ${debian_packages[*]}"; return; }
    mapfile -t missing < <(missing_packages)
    ((${#missing[@]} == 0)) && { echo "all there"; return; }
    as_root true 2>/dev/null || { echo "not root: have someone run apt-get install ${missing[*]}"; return; }
    as_root apt-get update -qq </dev/null || echo "apt-get update failed: using the lists at hand"
    # One unknown name makes apt-get refuse the whole line: then take those that exist.
    apt_install "${missing[@]}" || for package in "${missing[@]}"; do apt_install "$package" || true; done
    mapfile -t missing < <(missing_packages)
    ((${#missing[@]} == 0)) || echo "not installed: ${missing[*]} (apt-get install ${missing[*]})"
}

# ---- step 3: the environment, torch, the requirements ----------------------------------------------

# Prints the interpreter to build on: the one that has the image's torch, else the first new enough.
base_python() {
    local candidate test candidates=(python python3) PATH="${PATH//"$environment/bin:"/}"
    [[ -z "${PYTHON:-}" ]] || candidates=("$PYTHON")
    for test in 'importlib.util.find_spec("torch") is not None' True; do
        for candidate in "${candidates[@]}"; do
            "$candidate" -c "import importlib.util, sys
sys.exit(not (sys.version_info >= (3, 10) and $test))" 2>/dev/null && { command -v "$candidate"; return; }
        done
    done
    fail "no Python 3.10 or newer here (${candidates[*]}): name one with PYTHON=..."
}

python_minor() { "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null || true; }

make_environment() {
    say "step 3: the environment $environment"
    local base version
    base="$(base_python)"
    version="$(python_minor "$base")"
    if [[ -n "$version" && "$(python_minor "$env_python")" == "$version" ]]; then
        echo "there already, Python $version"
        return
    fi
    [[ -f "$environment/pyvenv.cfg" || -z "$(ls -A "$environment" 2>/dev/null)" ]] \
        || fail "$environment holds something else: choose another folder with SAMVAD_ENV=..."
    mkdir -p "$environment" || fail "cannot write $environment: choose another folder with SAMVAD_ENV=..."
    echo "building it on $base, Python $version"
    # Without Debian's python3-venv there is no ensurepip: then the pip at hand fills the environment.
    "$base" -m venv --clear --system-site-packages "$environment" >/dev/null 2>&1 || {
        "$base" -m venv --clear --system-site-packages --without-pip "$environment"
        "$base" -m pip --python "$env_python" install --quiet pip
    }
    show_base_packages "$base"
}

# An image may keep its torch in an environment of its own, which system-site-packages does not show.
show_base_packages() {
    "$1" - "$environment" <<'PYTHON'
import pathlib, sys, sysconfig
folder = "python%d.%d" % sys.version_info[:2]
if sys.prefix != sys.base_prefix:
    target = pathlib.Path(sys.argv[1]) / "lib" / folder / "site-packages" / "image.pth"
    target.write_text(sysconfig.get_path("purelib") + "\n")
PYTHON
}

# Prints one line on the torch that the environment sees: a verdict, then the versions.
#   ok | absent | old | no-cuda | unmatched (torch is good, torchaudio is missing or of another release)
torch_state() {
    "$env_python" - "$cpu" <<'PYTHON'
import re, sys

def release(version):
    return tuple(int(part) for part in re.findall(r"\d+", version.split("+")[0])[:3])

def state(cpu):
    try:
        import torch
    except Exception as problem:
        return f"absent ({type(problem).__name__})"
    if release(torch.__version__) < (2, 8):
        return f"old {torch.__version__}"
    if not cpu and not torch.cuda.is_available():
        return f"no-cuda {torch.__version__}"
    try:
        import torchaudio
    except Exception:
        return f"unmatched {torch.__version__} none"
    matched = release(torch.__version__) == release(torchaudio.__version__)
    return f"{'ok' if matched else 'unmatched'} {torch.__version__} {torchaudio.__version__}"

print(state(sys.argv[1] == "1"))
PYTHON
}

# The torchaudio of the torch that works, from the index of the same CUDA version.
add_matching_torchaudio() {
    local version="$1" index=()
    [[ "$version" != *+* ]] || index=(--index-url "$pytorch_index/${version#*+}")
    pip_install --no-deps "torchaudio==${version%%+*}" "${index[@]}" && [[ "$(torch_state)" == ok* ]]
}

install_torch_pair() {
    local index=()
    if [[ "$cpu" == 1 ]]; then
        index=(--index-url "$pytorch_index/cpu")
    elif ((${driver%%.*} < cuda12_driver)); then
        fail "driver $driver is older than $cuda12_driver: choose a pod by RunPod's filter, CUDA 12.8 or newer"
    elif ((${driver%%.*} < cuda13_driver)); then
        index=(--index-url "$pytorch_index/cu128")
    fi
    pip_install "torch==$torch_pair" "torchaudio==$torch_pair" "${index[@]}"
}

# pip inside the environment, also when the user types it, may not put another torch before this one.
hold_torch() {
    "$env_python" -c "
import importlib.metadata as metadata
for name in ('torch', 'torchaudio'):
    print(f'{name}=={metadata.version(name)}')" >"$environment/keep-torch.txt"
    printf '[install]\nconstraint = %s\n' "$environment/keep-torch.txt" >"$environment/pip.conf"
}

install_torch() {
    local state
    rm -f "$environment/pip.conf"
    state="$(torch_state)"
    case "$state" in
        ok*) echo "keeping torch and torchaudio as they are: ${state#ok }" ;;
        unmatched*)
            read -r _ version _ <<<"$state"
            echo "torch $version works, torchaudio does not match it: adding the one that does"
            add_matching_torchaudio "$version" || {
                echo "torchaudio has no release for torch $version: the environment gets the pair $torch_pair"
                install_torch_pair
            } ;;
        *)
            echo "the image's torch cannot be used: $state"
            install_torch_pair ;;
    esac
    hold_torch
}

# Without its torch lines: which torch is settled above.
install_requirements() {
    grep -vE '^torch(audio)?\b' "$here/requirements.txt" >"$environment/requirements.txt"
    pip_install -r "$environment/requirements.txt"
}

# flash-attention's own releases name CUDA, torch, C++ ABI and Python; only the exact one will load.
flash_attn_wheel() {
    "$env_python" -c '
import sys, torch
cuda, python = (torch.version.cuda or "0").split(".")[0], "cp%d%d" % sys.version_info[:2]
release = ".".join(torch.__version__.split(".")[:2])
abi = str(torch.compiled_with_cxx11_abi()).upper()
print("https://github.com/Dao-AILab/flash-attention/releases/download/v2.8.3/flash_attn-2.8.3"
      f"+cu{cuda}torch{release}cxx11abi{abi}-{python}-{python}-linux_x86_64.whl")'
}

install_flash_attn() {
    [[ "${WITH_FLASH_ATTN:-0}" == 1 && "$cpu" == 0 ]] || return 0
    say "flash-attn, as a ready-made wheel"
    "$env_python" -c 'import flash_attn' 2>/dev/null && { echo "there already"; return; }
    local wheel="${FLASH_ATTN_WHEEL:-$(flash_attn_wheel)}"
    if pip_install einops && pip_install --no-deps --only-binary :all: "$wheel" \
        && "$env_python" -c 'import flash_attn' 2>/dev/null; then
        return
    fi
    "$env_python" -m pip uninstall --quiet --yes flash-attn 2>/dev/null || true
    echo "no wheel of flash-attn fits here: going on without it, PyTorch's own attention is used."
    echo "Another maker's wheel of the same torch, CUDA and Python: FLASH_ATTN_WHEEL=URL"
}

# ---- the environment in every shell ----------------------------------------------------------------

write_shell_hook() {
    local hook="$environment/samvad.sh" bashrc="$HOME/.bashrc" kept=""
    cat >"$hook" <<HOOK
# Written by runpod_setup.sh: bare python and pip are the environment's, models stay on its volume.
export HF_HOME="\${HF_HOME:-$HF_HOME}"
. "$environment/bin/activate"
HOOK
    # Taken out and put back as the last block: the pod's own lines before it may reset PATH.
    [[ ! -f "$bashrc" ]] || kept="$(sed '/^# >>> samvad >>>$/,/^# <<< samvad <<<$/d' "$bashrc")"
    {
        [[ -z "$kept" ]] || printf '%s\n' "$kept"
        printf '%s\n' "# >>> samvad >>>" "[ ! -f '$hook' ] || . '$hook'" "# <<< samvad <<<"
    } >"$bashrc.samvad"
    cat "$bashrc.samvad" >"$bashrc"   # keeps owner, mode and a link in place
    rm -f "$bashrc.samvad"
    # tmux opens login shells: without any profile these would not read .bashrc.
    [[ -f "$HOME/.bash_profile" || -f "$HOME/.bash_login" || -f "$HOME/.profile" ]] \
        || echo "[ -z \"\$BASH\" ] || . ~/.bashrc" >"$HOME/.profile"
}

# ---- step 5: Hugging Face --------------------------------------------------------------------------

check_hugging_face() {
    say "step 5: Hugging Face login and licences"
    "$env_python" - <<'PYTHON'
import os
from huggingface_hub import HfApi, auth_check, get_token, login
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

GATED = (
    ("dataset", "ai4bharat/IndicVoices"), ("dataset", "ai4bharat/Kathbath"),
    ("dataset", "ai4bharat/Shrutilipi"), ("dataset", "ARTPARK-IISc/Vaani"),
    ("dataset", "ai4bharat/Rasa"),
    ("model", "google/gemma-3-1b-pt"), ("model", "ai4bharat/indic-parler-tts"),
)

def page(kind, name):
    return f"https://huggingface.co/{'datasets/' if kind == 'dataset' else ''}{name}"

def licence(kind, name):
    try:
        auth_check(name, repo_type=kind)
        return "accepted"
    except GatedRepoError:
        return "TO ACCEPT"
    except RepositoryNotFoundError:
        return "NOT FOUND"
    except Exception as problem:
        return f"not reached ({type(problem).__name__})"

def log_in():
    """Returns the account's name, or None with the reason printed."""
    token = os.environ.get("HF_TOKEN")
    if not (token or get_token()):
        print("not logged in: make a read token on https://huggingface.co/settings/tokens, then\n"
              "  export HF_TOKEN=hf_...   and paste the set-up line again. It will check these licences:")
        return None
    try:
        if token:
            login(token=token, add_to_git_credential=False)
        return HfApi().whoami()["name"]
    except Exception as problem:
        print(f"the login did not work ({type(problem).__name__}): is HF_TOKEN right, is the network up?")
        return None

name = log_in()
if name:
    print(f"logged in as {name}")
rows = [(licence(*repo) if name else "to check", *repo) for repo in GATED]
for state, kind, repo in rows:
    print(f"  {state:<12} {page(kind, repo)}")
if any(state == "TO ACCEPT" for state, *_ in rows):
    print("Open each page TO ACCEPT, accept, and paste the set-up line again. Accepted already? Then the\n"
          "token lacks the permission 'read access to all public gated repos you can access'.")
PYTHON
}

# ---- step 4: verification --------------------------------------------------------------------------

verify() {
    say "step 4: what is here"
    "$env_python" - "$cpu" "${driver:-none}" "$environment" <<'PYTHON'
import platform, shutil, subprocess, sys

cpu, driver, environment = sys.argv[1] == "1", sys.argv[2], sys.argv[3]
failed = []

def row(name, probe, required=True):
    try:
        good, text = True, probe()
    except (ModuleNotFoundError, FileNotFoundError):
        good, text = False, "not installed"
    except Exception as problem:
        good, text = False, f"{type(problem).__name__}: {problem}".splitlines()[0][:60]
    mark = "ok" if good else "FAILED" if required else "-"
    if not good and required:
        failed.append(name)
    print(f"  {name:<12} {mark:<7} {text}")

def torch_version():
    import torch
    return torch.__version__

def cuda():
    import torch
    if not torch.cuda.is_available():
        raise RuntimeError("torch cannot reach the GPU")
    return str(torch.version.cuda)

def gpu():
    import torch
    memory = torch.cuda.get_device_properties(0).total_memory / 2**30
    return f"{torch.cuda.get_device_name(0)}, {memory:.0f} GiB"

def torchaudio_version():
    import torchaudio
    return torchaudio.__version__

def teachers():
    import transformers
    from transformers import WavLMModel, WhisperModel
    names = " and ".join(kind.__name__ for kind in (WhisperModel, WavLMModel))
    return f"transformers {transformers.__version__}, {names} import"

def flash_attn():
    import flash_attn
    return flash_attn.__version__

def disk():
    return f"{shutil.disk_usage(environment).free / 1e9:.0f} GB free beside {environment}"

def ffmpeg():
    line = subprocess.run(["ffmpeg", "-version"], capture_output=True, text=True, check=True).stdout
    return " ".join(line.split()[:3])

row("python", lambda: f"{platform.python_version()} {sys.executable}")
row("torch", torch_version)
if cpu:
    print("  cuda, gpu    -       not used (--cpu)")
else:
    row("cuda", cuda)
    row("gpu", gpu)
    row("driver", lambda: driver)
row("torchaudio", torchaudio_version)
row("teachers", teachers)
row("flash-attn", flash_attn, required=False)
row("disk", disk)
row("ffmpeg", ffmpeg, required=False)
sys.exit(f"error: not ready: {', '.join(failed)}" if failed else 0)
PYTHON
}

main() {
    parse_arguments "$@"
    driver=""
    export HF_HOME="${HF_HOME:-$(dirname "$environment")/.cache/huggingface}"
    check_driver
    install_debian_packages
    make_environment
    install_torch
    install_requirements
    install_flash_attn
    write_shell_hook
    check_hugging_face
    verify
    echo
    echo "Ready. New shells and tmux panes use the environment by themselves. This one, if it does not yet:"
    echo "  source $environment/samvad.sh"
    echo "After the pod was stopped and started again (seconds):"
    echo "  source $here/runpod_setup.sh$([[ "$cpu" == 0 ]] || echo " --cpu")"
}

main "$@"
