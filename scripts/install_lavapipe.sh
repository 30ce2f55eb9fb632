#!/usr/bin/env bash
# Installs a software Vulkan driver (Mesa's lavapipe) where no Vulkan driver is present, so that the wgpu
# backend can be tested on machines without a GPU. Says what it installs; does nothing when an ICD exists.
set -euo pipefail

say() { printf 'install_lavapipe: %s\n' "$*"; }

have_icd() {
    local dir
    for dir in /usr/share/vulkan/icd.d /etc/vulkan/icd.d /usr/local/share/vulkan/icd.d; do
        compgen -G "$dir/*.json" >/dev/null && return 0
    done
    return 1
}

have_loader() { ldconfig -p 2>/dev/null | grep -q 'libvulkan\.so\.1'; }

# The archive URI of a configured Debian source for the given suite (deb822 and one-line formats).
debian_uri() {
    local suite=$1 file
    for file in /etc/apt/sources.list.d/*.sources; do
        [ -f "$file" ] || continue
        awk -v suite="$suite" '
            function done_stanza() { if (uri != "" && hit) { print uri; found = 1; exit } uri = ""; hit = 0 }
            /^[[:space:]]*$/ { done_stanza(); next }
            /^URIs:/ { uri = $2 }
            /^Suites:/ { for (i = 2; i <= NF; i++) if ($i == suite) hit = 1 }
            END { if (!found) done_stanza() }' "$file"
    done
    for file in /etc/apt/sources.list /etc/apt/sources.list.d/*.list; do
        [ -f "$file" ] || continue
        sed -E 's/\[[^]]*\]//' "$file" | awk -v suite="$suite" '$1 == "deb" && $3 == suite { print $2 }'
    done
}

if have_icd && have_loader; then
    say "a Vulkan driver is already installed, nothing to do"
    exit 0
fi

if ! command -v apt-get >/dev/null; then
    say "no apt-get here: install Mesa's software Vulkan driver (lavapipe) and the Vulkan loader with this system's package manager"
    exit 1
fi

root=()
if [ "$(id -u)" -ne 0 ]; then
    command -v sudo >/dev/null || { say "installing mesa-vulkan-drivers needs root"; exit 1; }
    root=(sudo)
fi

codename=$(. /etc/os-release && printf '%s' "${VERSION_CODENAME:-}")
packages=(mesa-vulkan-drivers libvulkan1)
target=()
# Debian 12's own Mesa runs shaders 5 to 10 times slower than the one in its backports.
if [ "$codename" = bookworm ]; then
    uri=$(debian_uri bookworm | head -n 1)
    if [ -n "$uri" ]; then
        list=/etc/apt/sources.list.d/bookworm-backports.list
        if ! grep -rqs 'bookworm-backports' /etc/apt/sources.list /etc/apt/sources.list.d; then
            say "adding the suite bookworm-backports of the configured mirror in $list"
            key=/usr/share/keyrings/debian-archive-keyring.gpg
            option=""
            [ -f "$key" ] && option="[signed-by=$key] "
            printf 'deb %s%s bookworm-backports main\n' "$option" "$uri" | "${root[@]}" tee "$list" >/dev/null
        fi
        target=(-t bookworm-backports)
    fi
fi

say "installing ${packages[*]} ${target[*]:+from ${target[1]} }with apt-get"
"${root[@]}" apt-get update -qq
if ! "${root[@]}" env DEBIAN_FRONTEND=noninteractive \
    apt-get install -y -qq --no-install-recommends "${target[@]}" "${packages[@]}" >/dev/null; then
    say "apt-get could not install ${packages[*]}; install a Vulkan driver by hand"
    exit 1
fi
say "installed: $(dpkg-query -W -f '${Package} ${Version}  ' "${packages[@]}")"
