# shellcheck shell=bash
# What the tests need besides Rust; read by scripts/test.sh and .ci/run from the repository's root.
#
# * a Vulkan driver: Mesa's software driver is installed where there is none (LONGSIGHT_LAVAPIPE=off: not);
# * nvcc: unpacked under target/ where there is no CUDA toolkit (LONGSIGHT_NVCC=off: not).
#
# Exports CUDA_HOME or LONGSIGHT_NVCC for the build, LONGSIGHT_REQUIRE for the conformance test.

setup_say() { printf 'setup: %s\n' "$*"; }

setup_lavapipe_found() {
    compgen -G '/usr/share/vulkan/icd.d/lvp_icd*.json' >/dev/null ||
        compgen -G '/etc/vulkan/icd.d/lvp_icd*.json' >/dev/null
}

setup_vulkan_found() {
    local dir ldconfig
    [ -n "${VK_DRIVER_FILES:-}${VK_ICD_FILENAMES:-}" ] && return 0
    ldconfig=$(command -v ldconfig || printf '/sbin/ldconfig')
    # Drivers are of no use without the loader.
    if [ -x "$ldconfig" ] && ! "$ldconfig" -p | grep 'libvulkan\.so\.1' >/dev/null; then
        return 1
    fi
    for dir in /usr/share/vulkan/icd.d /etc/vulkan/icd.d /usr/local/share/vulkan/icd.d; do
        compgen -G "$dir/*.json" >/dev/null && return 0
    done
    return 1
}

setup_is_root() { [ "$(id -u)" -eq 0 ] || { command -v sudo >/dev/null && sudo -n true 2>/dev/null; }; }

setup_vulkan() {
    if [ "$(uname -s)" != Linux ]; then
        setup_say "no Vulkan driver is installed on this system; the wgpu tests use what is there"
    elif [ "${LONGSIGHT_LAVAPIPE:-}" = off ]; then
        setup_say "LONGSIGHT_LAVAPIPE=off: the wgpu tests use the Vulkan driver that is there, if any"
    elif setup_vulkan_found; then
        setup_say "a Vulkan driver is there"
    elif command -v apt-get >/dev/null && setup_is_root; then
        setup_say "no Vulkan driver: installing Mesa's software driver with apt-get"
        if ! scripts/install_lavapipe.sh </dev/null; then
            setup_say "it could not be installed; LONGSIGHT_LAVAPIPE=off tests without it" >&2
            return 1
        fi
    else
        setup_say "no Vulkan driver: the wgpu backend is NOT tested. To test it, run"
        setup_say "scripts/install_lavapipe.sh as root, or install Mesa's lavapipe and the Vulkan loader"
    fi
    # The software driver needs no GPU: where it is installed, wgpu must work.
    if [ "${LONGSIGHT_LAVAPIPE:-}" != off ] && [ -z "${LONGSIGHT_BACKENDS:-}" ] && setup_lavapipe_found; then
        export LONGSIGHT_REQUIRE=${LONGSIGHT_REQUIRE:-cpu,wgpu}
    fi
}

# The order in which the build looks for nvcc.
setup_nvcc_found() {
    local file
    for file in "${NVCC:-}" "${CUDA_HOME:-}/bin/nvcc" "${CUDA_PATH:-}/bin/nvcc" /usr/local/cuda/bin/nvcc; do
        [ -x "$file" ] && [ ! -d "$file" ] && return 0
    done
    command -v nvcc >/dev/null
}

setup_nvcc() {
    local line
    if [ "${LONGSIGHT_NVCC:-}" = off ]; then
        setup_say "LONGSIGHT_NVCC=off: the CUDA kernels are NOT compiled"
    elif setup_nvcc_found; then
        setup_say "a CUDA toolkit is there: its nvcc compiles the kernels"
    elif [ "$(uname -s) $(uname -m)" != "Linux x86_64" ]; then
        setup_say "nvcc is not installed on this system: the CUDA kernels are NOT compiled"
        export LONGSIGHT_NVCC=off
    else
        setup_say "no CUDA toolkit: unpacking NVIDIA's compiler (about 510 MB, through pip) into target/nvcc"
        if ! line=$(scripts/install_nvcc.sh </dev/null | tail -n 1); then
            setup_say "it could not be installed; LONGSIGHT_NVCC=off tests without compiling CUDA kernels" >&2
            return 1
        fi
        eval "$line"
    fi
}

setup_vulkan
setup_nvcc
