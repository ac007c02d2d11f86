#!/usr/bin/env bash
# Prepare a fresh machine: .venv with rlvla and its tools, and a Vulkan driver for the simulators.
#
#   scripts/setup.sh              everything
#   scripts/setup.sh --packages   .venv only
#   scripts/setup.sh --vulkan     the Vulkan driver only (the one step that wants root)
#
# Run it as often as you like: a step that is already satisfied is skipped, a second run takes no time.
#
# Environment:
#   RLVLA_PYTHON  interpreter that makes .venv              (default: the first of 3.11, 3.12, 3.13)
#   RLVLA_TORCH   what pip shall install as torch: requirement and options, split at spaces, such as
#                 "torch==2.9.1" or "--find-links /mnt/wheels torch"
#   RLVLA_LIBERO  1 also makes LIBERO's environment, 750 MB to download (default: not; docs/how-to/libero.md)
#   RLVLA_ETC     where the machine's os-release and apt/ are (default: /etc)
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
root=$PWD
python=$root/.venv/bin/python
packages_stamp=.venv/rlvla-packages
vulkan_stamp=.venv/rlvla-vulkan
etc=${RLVLA_ETC:-/etc}

say() { printf 'setup: %s\n' "$*" >&2; }
die() { say "$*"; exit 1; }
# -qq leaves errors only.
pip_install() { "$python" -m pip install -qq --disable-pip-version-check "$@"; }

# --- packages ---------------------------------------------------------------------------------------

# What .venv was made from. The root is part of it: a virtual environment does not survive a move.
recipe() { cat pyproject.toml scripts/setup.sh | cksum | tr '\n' ' ' && echo "$root"; }

packages_are_current() {
    [[ -x $python && -f $packages_stamp ]] || return 1
    { read -r made_from && read -r torch_request; } < "$packages_stamp" || return 1
    [[ $made_from == "$(recipe)" && ${RLVLA_TORCH:-$torch_request} == "$torch_request" ]]
}

find_python() {
    local candidate
    for candidate in ${RLVLA_PYTHON:-python3.11 python3.12 python3.13 python3}; do
        # Asked, not looked up: a pyenv shim can exist for a version that is not there.
        if "$candidate" -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))' 2> /dev/null; then
            echo "$candidate"
            return
        fi
    done
    die "${RLVLA_PYTHON:-python3} is missing, older than 3.11, or has no venv. Install Python 3.11" \
        "(Debian and Ubuntu: apt-get install python3 python3-venv) or name one: RLVLA_PYTHON=/path/to/python3.11"
}

make_venv() {
    "$python" -m pip --version > /dev/null 2>&1 && return
    local base
    base=$(find_python)
    say "making .venv with $("$base" --version)"
    "$base" -m venv --clear .venv
}

torch_is_recent() {
    "$python" -c '
import sys, torch
sys.exit(tuple(map(int, torch.__version__.split(".")[:2])) < (2, 7))' > /dev/null 2>&1
}

# torch goes first: whatever pip picks for the other packages, they take the torch that is there.
install_torch() {
    if [[ -n ${RLVLA_TORCH:-} ]]; then
        say "installing $RLVLA_TORCH, as RLVLA_TORCH asks"
        # shellcheck disable=SC2086  # split on purpose
        pip_install $RLVLA_TORCH
    elif torch_is_recent; then
        return
    elif nvidia-smi > /dev/null 2>&1; then
        say "installing torch for CUDA (several GB)"
        pip_install "torch>=2.7"
    else
        say "installing torch. There is no GPU here, but unless pip is configured with a place that holds" \
            "CPU builds it takes the CUDA build: several GB, and it works all the same. RLVLA_TORCH chooses another"
        # This release by number: a CPU build in pip's find-links wins a tie, and loses to anything newer.
        pip_install "torch==2.13.0" 2> /dev/null || pip_install "torch>=2.7"
    fi
    say "torch $("$python" -c 'from importlib.metadata import version; print(version("torch"))')"
}

install_packages() {
    packages_are_current && return
    make_venv
    rm -f "$packages_stamp"
    install_torch
    say "installing rlvla and its dependencies (minutes on a new machine)"
    pip_install -e ".[dev]"
    # Tests of `rlvla serve` ask with it. Its metadata wants numpy 1; its code does not.
    pip_install --no-deps openpi-client==0.1.2
    printf '%s\n%s\n' "$(recipe)" "${RLVLA_TORCH:-}" > "$packages_stamp"
}

# --- Vulkan -----------------------------------------------------------------------------------------

# Render one picture of a box. Only that proves a driver: an old one loads, then throws or crashes.
# One process per device, in a subshell that keeps the crash report to itself.
renders_on() {
    (
        LP_NUM_THREADS=1 "$python" - "$1"
        exit
    ) > /dev/null 2>&1 << 'PYTHON'
import sys

import sapien

render = sapien.render.RenderSystem(sys.argv[1])
scene = sapien.Scene([sapien.physx.PhysxCpuSystem(), render])
scene.set_ambient_light([1, 1, 1])
box = scene.create_actor_builder()
box.add_box_visual(half_size=[0.1, 0.1, 0.1])
box.build_static(name="box")
camera = scene.add_camera("camera", width=16, height=16, fovy=1.0, near=0.01, far=10.0)
camera.set_entity_pose(sapien.Pose([-0.5, 0, 0]))
scene.update_render()
camera.take_picture()
colour = camera.get_picture("Color")  # a white box in the middle; alpha is 0 where there is nothing
sys.exit(0 if colour[8, 8].min() > 0 and colour[0, 0, 3] == 0 else 1)
PYTHON
}

vulkan_works() { renders_on cpu || renders_on cuda; }

os_release() { sed -nE "s/^$1=\"?([^\"]*)\"?\$/\1/p" "$etc/os-release" 2> /dev/null || true; }

apt_names_suite() {
    grep -qsE "^[^#]*[[:space:]]$1([[:space:]]|\$)" \
        "$etc"/apt/sources.list "$etc"/apt/sources.list.d/*.list "$etc"/apt/sources.list.d/*.sources
}

# Copy the machine's own Debian source, with another suite: mirrors, proxies and keys stay what they are.
add_backports() {
    local codename=$1 suite=$1-backports folder=$etc/apt/sources.list.d file entry
    apt_names_suite "$suite" && return
    for file in "$folder"/*.sources; do
        entry=$(awk -v old="$codename" -v new="$suite" '
            BEGIN { RS = ""; FS = "\n" }
            {
                text = ""; found = 0; off = 0; in_suites = 0
                for (i = 1; i <= NF; i++) {
                    if ($i ~ /^#/) continue
                    if ($i ~ /^[^ \t]/) in_suites = ($i ~ /^Suites:/)
                    if ($i ~ /^Enabled:[ \t]*no/) off = 1
                    if (!in_suites) { text = text $i "\n"; continue }
                    n = split($i, words, /[ \t]+/)
                    for (j = 1; j <= n; j++) if (words[j] == old) found = 1
                    if ($i ~ /^Suites:/) text = text "Suites: " new "\n"
                }
                if (found && !off) { printf "%s", text; exit }
            }' "$file" 2> /dev/null) || entry=
        if [[ -n $entry ]]; then
            printf '%s\n' "$entry" > "$folder/rlvla-backports.sources"
            return
        fi
    done
    for file in "$etc/apt/sources.list" "$folder"/*.list; do
        entry=$(sed -nE "s/^(deb[[:space:]]+(\[[^]]*\][[:space:]]+)?[^[:space:]]+[[:space:]]+)$codename([[:space:]].*)\$/\1$suite\3/p" \
            "$file" 2> /dev/null | head -n 1) || entry=
        if [[ -n $entry ]]; then
            printf '%s\n' "$entry" > "$folder/rlvla-backports.list"
            return
        fi
    done
    return 1
}

install_vulkan_on_debian() {
    local codename pin=()
    codename=$(os_release VERSION_CODENAME)
    if [[ $codename == bookworm ]]; then # its own Mesa is 22.3
        if ! add_backports "$codename"; then
            say "no apt source of this machine names the suite $codename, so there is none to copy for $codename-backports"
            return 1
        fi
        pin=(-t "$codename-backports")
    fi
    say "installing Mesa's Vulkan driver with apt-get${pin[1]:+, from ${pin[1]}}"
    # An unrelated source that cannot be reached is no reason to stop.
    apt-get -qq update >&2 || say "apt-get update complained; going on"
    # The last three are what sapien and OpenCV link to and a slim image lacks.
    if ! DEBIAN_FRONTEND=noninteractive apt-get -qq install -y --no-install-recommends "${pin[@]}" \
        mesa-vulkan-drivers libvulkan1 libx11-6 libgl1 libglib2.0-0 > /dev/null; then
        rm -f "$etc"/apt/sources.list.d/rlvla-backports.* # a suite the mirror lacks would break every update
        return 1
    fi
}

may_use_apt() { [[ $(os_release ID) == debian && $EUID -eq 0 ]]; }

explain_vulkan() {
    say "ManiSkill cannot render here: no usable Vulkan driver. Everything else works."
    if [[ $(os_release ID) == debian && $EUID -ne 0 ]]; then
        say "To cure it: sudo $root/scripts/setup.sh --vulkan"
    else
        say "To cure it, install the Vulkan loader and Mesa's software driver lavapipe, Mesa 24.3 or newer" \
            "(Debian, Ubuntu: libvulkan1 mesa-vulkan-drivers; Fedora: vulkan-loader mesa-vulkan-drivers;" \
            "NVIDIA: the driver's own Vulkan files, in a container NVIDIA_DRIVER_CAPABILITIES=all)," \
            "then run scripts/setup.sh again."
    fi
}

install_vulkan() {
    [[ -f $vulkan_stamp ]] && return
    [[ -x $python ]] || die "run scripts/setup.sh --packages first: the check renders a picture with .venv"
    say "rendering a test picture"
    if vulkan_works || { may_use_apt && install_vulkan_on_debian && vulkan_works; }; then
        touch "$vulkan_stamp"
    else
        explain_vulkan
    fi
}

# --- LIBERO, if wanted --------------------------------------------------------------------------------

install_libero() {
    [[ -n ${RLVLA_LIBERO:-} ]] || return 0
    if ! "$python" -c 'import ctypes; ctypes.CDLL("libOSMesa.so.8")' 2> /dev/null && may_use_apt; then
        say "installing OSMesa with apt-get"
        DEBIAN_FRONTEND=noninteractive apt-get -qq install -y --no-install-recommends libosmesa6 > /dev/null || true
    fi
    "$python" -m rlvla.cli suites setup libero > /dev/null
}

# ----------------------------------------------------------------------------------------------------

# Two runs at once would write one .venv. The lock is this file, and goes with the process.
if command -v flock > /dev/null; then
    exec 9< scripts/setup.sh
    if ! flock -n 9; then
        say "another run is at work; waiting for it"
        flock 9
    fi
fi

case ${1:-} in
    "")
        install_packages # on a line of its own: set -e is off inside a && b
        install_vulkan
        install_libero
        ;;
    --packages) install_packages ;;
    --vulkan) install_vulkan ;;
    -h | --help) sed -n '2,/^set -euo/{/^#/s/^# \{0,1\}//p;}' scripts/setup.sh ;;
    *) die "$1 is not an option. Options: --packages, --vulkan, --help" ;;
esac
