#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Guards: what an administrator installs works as shipped: units that systemd takes without a word and that stay closed,
# a configuration the real program accepts, images that hold every library, an installation that is complete.
set -uo pipefail
: "${TD_TANDEM:?}" "${TD_SOURCE_DIR:?}" "${TD_BINARY_DIR:?}"
deploy=$TD_SOURCE_DIR/deploy
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
failed=0
fail() {
    echo "FAILED $1: $2"
    failed=1
}
have() { command -v "$1" >/dev/null; }

# `verify` exits 0 on unknown keys: any word on stderr is a failure.
units_are_understood() {
    have systemd-analyze || { echo "SKIP units_are_understood: systemd-analyze is not installed (Debian: systemd)"; return; }
    mkdir "$tmp/units"
    local u name
    for u in "$deploy"/systemd/*.{service,socket,target}; do
        name=$(basename "$u")
        sed "s|/usr/bin/tandem|$TD_TANDEM|" "$u" >"$tmp/units/${name/@./@1.}"
    done
    for u in "$tmp"/units/*; do
        systemd-analyze verify "$u" >"$tmp/out" 2>&1 || fail units_are_understood "$(basename "$u"): $(cat "$tmp/out")"
        [ ! -s "$tmp/out" ] || fail units_are_understood "$(basename "$u"): $(cat "$tmp/out")"
    done
    # the check itself must see a wrong key
    echo "Wrogn=1" >>"$tmp/units/tandem-router.service"
    systemd-analyze verify "$tmp/units/tandem-router.service" >"$tmp/out" 2>&1
    [ -s "$tmp/out" ] || fail units_are_understood "a wrong key went unseen"
}

# Tenths of a point; a bare unit scores 9.6.
units_are_closed() {
    have systemd-analyze || { echo "SKIP units_are_closed: systemd-analyze is not installed (Debian: systemd)"; return; }
    local u limit
    for u in "$deploy"/systemd/*.service; do
        case $u in */tandem-router.service) limit=11 ;; *) limit=4 ;; esac
        systemd-analyze security --offline=yes --no-pager --threshold=$limit "$u" >"$tmp/out" 2>&1 ||
            fail units_are_closed "$(basename "$u"): $(tail -1 "$tmp/out")"
        # without it libzmq's first thread dies of SIGSYS: seen under a real systemd, which no test here can start
        grep -q '^SystemCallFilter=.*sched_setscheduler' "$u" || fail units_are_closed "$(basename "$u"): libzmq cannot start"
    done
    grep -v -E '^(Protect|Private|Restrict|System|Capa)' "$deploy/systemd/tandem-router.service" >"$tmp/open.service"
    ! systemd-analyze security --offline=yes --no-pager --threshold=11 "$tmp/open.service" >/dev/null 2>&1 ||
        fail units_are_closed "an open unit passed"
}

user_and_directories_are_made() {
    { have systemd-sysusers && have systemd-tmpfiles; } || { echo "SKIP user_and_directories_are_made: systemd-sysusers is not installed (Debian: systemd)"; return; }
    mkdir -p "$tmp/root/etc"
    systemd-sysusers --root="$tmp/root" "$deploy/systemd/tandem.sysusers" >"$tmp/out" 2>&1 || fail sysusers "$(cat "$tmp/out")"
    grep -q '^tandem:' "$tmp/root/etc/passwd" || fail sysusers "no user tandem in $(cat "$tmp/root/etc/passwd")"
    [ "$(id -u)" = 0 ] || return
    systemd-tmpfiles --root="$tmp/root" --create "$deploy/systemd/tandem.tmpfiles" >"$tmp/out" 2>&1 || fail tmpfiles "$(cat "$tmp/out")"
    [ -d "$tmp/root/var/lib/tandem/models" ] || fail tmpfiles "no /var/lib/tandem/models"
}

# The same file, and with each variable that a unit or the compose file sets.
configuration_is_accepted() {
    "$TD_TANDEM" config check "$deploy/tandem.conf" >"$tmp/out" 2>&1 || fail configuration_is_accepted "$(cat "$tmp/out")"
    local line
    sed -nE 's/^Environment=(TANDEM_[A-Z_]+=.*)$/\1/p' "$deploy"/systemd/*.service >"$tmp/env"
    sed -nE 's/^ +(TANDEM_[A-Z_]+): (.*)$/\1=\2/p' "$deploy/container/compose.yaml" >>"$tmp/env"
    [ "$(wc -l <"$tmp/env")" -ge 6 ] || fail configuration_is_accepted "found only: $(cat "$tmp/env")"
    while read -r line; do
        env "$line" "$TD_TANDEM" config check "$deploy/tandem.conf" >"$tmp/out" 2>&1 ||
            fail configuration_is_accepted "$line: $(cat "$tmp/out")"
        grep -q -F "environment" "$tmp/out" || fail configuration_is_accepted "$line had no effect"
    done <"$tmp/env"
    sed 's/^listen/lisetn/' "$deploy/tandem.conf" >"$tmp/wrong.conf"
    ! "$TD_TANDEM" config check "$tmp/wrong.conf" >"$tmp/out" 2>&1 || fail configuration_is_accepted "a wrong key was accepted"
    grep -q "listen" "$tmp/out" || fail configuration_is_accepted "the nearest name is not told: $(cat "$tmp/out")"
}

compose_is_valid() {
    local tool
    if have docker-compose; then tool="docker-compose -f $deploy/container/compose.yaml config -q"
    elif have docker && docker compose version >/dev/null 2>&1; then tool="docker compose -f $deploy/container/compose.yaml config -q"
    else
        echo "SKIP compose_is_valid: docker-compose is not installed (Debian: docker-compose)"
        return
    fi
    TANDEM_MODEL=/models $tool >"$tmp/out" 2>&1 || fail compose_is_valid "$(cat "$tmp/out")"
    ! env -u TANDEM_MODEL $tool >"$tmp/out" 2>&1 || fail compose_is_valid "no TANDEM_MODEL, and no error"
}

# Every shared library of the program comes with a package that the runtime image installs.
image_has_every_library() {
    { have readelf && have dpkg-query && have ldconfig; } || { echo "SKIP image_has_every_library: needs readelf and dpkg"; return; }
    local lib path package
    sed -n '/AS runtime/,/AS router/p' "$deploy/container/Containerfile" >"$tmp/runtime"
    for lib in $(readelf -d "$TD_TANDEM" | sed -nE 's/.*\(NEEDED\).*\[(.*)\]/\1/p'); do
        path=$(ldconfig -p | awk -v l="$lib" '$1 == l && /x86-64/ {print $NF; exit}')
        # merged /usr: dpkg may know the file by either name
        package=$( (dpkg-query -S "$(readlink -f "$path")" || dpkg-query -S "${path#/usr}" || dpkg-query -S "$path") 2>/dev/null | head -1 | cut -d: -f1)
        case $package in
        "") fail image_has_every_library "no package owns $lib" ;;
        libc6) ;;
        libasan* | libubsan* | libgcc*) ;; # builds for tests
        *) grep -q -w -F -e "$package" "$tmp/runtime" || fail image_has_every_library "$lib: the Containerfile does not install $package" ;;
        esac
    done
}

# Below /usr and below another prefix: units name the program and the configuration that lie beside them.
installation_is_complete() {
    local prefix conf f dest unit
    for prefix in /usr /opt/td; do
        dest=$tmp/dest$prefix conf=/opt/td/etc
        [ $prefix = /opt/td ] || conf=/etc
        DESTDIR=$dest cmake --install "$TD_BINARY_DIR" --prefix $prefix >"$tmp/out" 2>&1 ||
            { fail installation_is_complete "$(tail -3 "$tmp/out")"; return; }
        for f in $conf/tandem/tandem.conf $prefix/bin/tandem $prefix/lib/sysusers.d/tandem.conf \
            $prefix/lib/tmpfiles.d/tandem.conf $prefix/share/tandem/proto/inference.proto; do
            [ -f "$dest$f" ] || fail installation_is_complete "no $f"
        done
        for unit in "$deploy"/systemd/*.service; do
            f=$(find "$dest" -name "$(basename "$unit")")
            [ -n "$f" ] || fail installation_is_complete "no $(basename "$unit")"
            grep -q -E "^ExecStart=$prefix/bin/tandem [a-z-]+ --config $conf/tandem/tandem.conf\$" "$f" ||
                fail installation_is_complete "$prefix: $(grep ExecStart "$f")"
        done
    done
}

package_has_our_version() {
    local ours theirs
    ours=$(sed -nE 's/^project\(tandem VERSION ([0-9.]+).*/\1/p' "$TD_SOURCE_DIR/CMakeLists.txt")
    theirs=$(sed -nE '1s/^tandem \(([^)]*)\).*/\1/p' "$TD_SOURCE_DIR/debian/changelog")
    [ -n "$ours" ] && [ "$ours" = "$theirs" ] || fail package_has_our_version "CMake $ours, debian/changelog $theirs"
}

units_are_understood
units_are_closed
user_and_directories_are_made
configuration_is_accepted
compose_is_valid
image_has_every_library
installation_is_complete
package_has_our_version
exit $failed
