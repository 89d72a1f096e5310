# SPDX-License-Identifier: Apache-2.0
# Shared by ./quickstart and ./check: say what is done, install what is missing, build. Sourced, from the root of the checkout.

say() { printf '%s\n' "$*"; }
step() { printf '== %s\n' "$*"; }
fail() {
    printf 'FAILED: %s\n' "$1" >&2
    [ $# -lt 2 ] || printf '        %s\n' "$2" >&2
    exit 1
}

BUILD_PACKAGES="gcc libc6-dev cmake ninja-build pkg-config git ca-certificates libevent-dev libzmq3-dev libprotobuf-c-dev
    protobuf-c-compiler libjansson-dev libpcre2-dev libicu-dev libsystemd-dev libxxhash-dev libsodium-dev
    libssl-dev libcmocka-dev"
CHECK_PACKAGES="g++ clang llvm libclang-rt-14-dev python3 python3-zmq python3-protobuf protobuf-compiler python3-jinja2 prometheus systemd curl procps
    iproute2 clang-format-14"

# need_packages build|check|sdk: install from Debian what dpkg does not have. Asks nothing.
need_packages() {
    local want=$BUILD_PACKAGES missing= p
    [ "$1" = build ] || want="$BUILD_PACKAGES $CHECK_PACKAGES"
    if [ "$1" = sdk ]; then # a node and npm from elsewhere will do
        want=python3-venv
        command -v node >/dev/null && command -v npm >/dev/null || want="$want nodejs npm"
    fi
    for p in $want; do
        [ "$(dpkg-query -W -f '${db:Status-Abbrev}' "$p" 2>/dev/null)" = "ii " ] || missing="$missing $p"
    done
    [ -n "$missing" ] || return 0
    command -v apt-get >/dev/null || fail "missing packages:$missing" "this is not Debian: install their like by hand"
    step "installing from Debian:$missing"
    local as_root=
    if [ "$(id -u)" != 0 ]; then
        command -v sudo >/dev/null || fail "missing packages:$missing" "run as root: apt-get install$missing"
        as_root="sudo -n"
        $as_root true 2>/dev/null || fail "missing packages:$missing" "run: sudo apt-get install$missing"
    fi
    local log
    log=$(mktemp)
    export DEBIAN_FRONTEND=noninteractive
    # shellcheck disable=SC2086
    if ! { $as_root apt-get -o DPkg::Lock::Timeout=300 update -q && $as_root apt-get -o DPkg::Lock::Timeout=300 install -q -y --no-install-recommends $missing; } >"$log" 2>&1; then
        tail -n 15 "$log" >&2
        rm -f "$log"
        fail "apt-get could not install:$missing" "is this machine online? Its messages are above; then run this again"
    fi
    rm -f "$log"
}

# configure_and_build DIR PRESET TARGET...: quiet unless it fails.
configure_and_build() {
    local dir=$1 preset=$2 log
    shift 2
    log=$(mktemp)
    if ! { cmake --preset "$preset" ${TD_CMAKE_FLAGS:-} -B "$dir" && cmake --build "$dir" --target "$@"; } >"$log" 2>&1; then
        tail -n 40 "$log" >&2
        rm -f "$log"
        fail "the build in $dir failed" "the compiler's messages are above"
    fi
    rm -f "$log"
}
