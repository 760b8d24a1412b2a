#!/bin/sh
# Install Hotspare on this device as a systemd service, or upgrade it; run from a checkout, as root:
#
#   systemd/install.sh                      the node
#   systemd/install.sh --coordinator        the coordinator, on the machine that has nginx
#
# Each installation is a virtual environment of its own below /opt/hotspare/releases; /opt/hotspare/bin leads to the one that serves. A new
# one that refuses the configuration, or does not come up, is left and the one before goes on. Nothing in /etc/hotspare is overwritten.
#
# PYTHON         Python 3.10 or newer for the daemon (default: the newest there is; where there is none, uv fetches one)
# WORKER_PYTHON  the interpreter of the workers, written into a new configuration (default: where /usr/bin/python3 has TensorRT, as JetPack's
#                has, an environment that sees its packages; else the daemon's)
# EXTRAS         of the package (default: cpu)
# DESTDIR        another root, to look at what would be there; an image is made by running this inside of it (chroot), for environments know
#                their own path. Where no systemd runs, nothing is started
set -eu

fail() { echo "install: $*" >&2; exit 1; }
say() { echo "install: $*"; }

service=hotspare
case "${1:-}" in
    "") ;;
    --coordinator) service=hotspare-coordinator ;;
    *) fail "unknown option $1; there is --coordinator, or none" ;;
esac
[ "$(id -u)" = 0 ] || fail "this needs root: sudo $0 $*"
source=$(cd "$(dirname "$0")/.." && pwd)
[ -f "$source/pyproject.toml" ] || fail "$source is no checkout of Hotspare; run the script where it lies"
root=${DESTDIR:-}
home=$root/opt/hotspare

usable() { "$1" -c 'import ensurepip, sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; }
find_python() {
    for candidate in ${PYTHON:-python3.13 python3.12 python3.11 python3.10 python3}; do
        if usable "$candidate"; then echo "$candidate"; return; fi
    done
}

# CUDA 11 of JetPack 5, with TensorRT 8, has a cuda-python of its own.
find_worker() {
    if [ -n "${WORKER_PYTHON:-}" ]; then echo "$WORKER_PYTHON"; return; fi
    major=$(/usr/bin/python3 -c 'import tensorrt; print(tensorrt.__version__.split(".")[0])' 2>/dev/null) || return 0
    case $major in 8) cuda='cuda-python<12' ;; *) cuda='cuda-python>=12,<13' ;; esac
    say "TensorRT $major here: environment of the workers in $home/worker" >&2
    /usr/bin/python3 -m venv --system-site-packages "$home/worker" >&2
    "$home/worker/bin/pip" install --quiet --disable-pip-version-check 'onnxruntime>=1.19' 'opencv-python-headless>=4.9' 'av>=12' "$cuda" >&2
    echo "$home/worker/bin/python"
}

release=$home/releases/$(date -u +%Y%m%dT%H%M%SZ)
before=$(readlink "$home/current" 2>/dev/null || true)
mkdir -p "$home/releases"
# What is begun and not finished is nothing.
is_done=
clean_up() { [ -n "$is_done" ] || rm -rf "$release"; }
trap clean_up EXIT
trap 'exit 130' INT TERM

python=$(find_python)
if [ -n "$python" ]; then
    say "environment of $($python --version) in $release"
    "$python" -m venv "$release"
else
    [ -z "${PYTHON:-}" ] || fail "PYTHON=$PYTHON is not Python 3.10 or newer with venv"
    say "no Python 3.10 or newer here: uv fetches one"
    python3 -m venv "$home/uv" || fail "python3 has no venv; apt-get install python3-venv"
    "$home/uv/bin/pip" install --quiet --disable-pip-version-check uv
    UV_PYTHON_INSTALL_DIR=$home/python "$home/uv/bin/uv" venv --quiet --seed --python 3.12 "$release"
fi
"$release/bin/python" -m pip install --quiet --disable-pip-version-check "${source}[${EXTRAS:-cpu}]"

install -d "$root/etc/hotspare" "$root/usr/lib/sysusers.d" "$root/usr/lib/tmpfiles.d" "$root/etc/systemd/system"
install -m 644 "$source/systemd/hotspare.sysusers" "$root/usr/lib/sysusers.d/hotspare.conf"
install -m 644 "$source/systemd/hotspare.tmpfiles" "$root/usr/lib/tmpfiles.d/hotspare.conf"
systemd-sysusers --root="$root/" hotspare.conf
systemd-tmpfiles --root="$root/" --create hotspare.conf
if [ "$service" = hotspare ]; then
    configuration=$root/etc/hotspare/hotspare.toml
    install -m 644 "$source/systemd/hotspare.service" "$root/etc/systemd/system/"
    if [ ! -e "$configuration" ]; then
        # Standalone until somebody writes more: systemd/hotspare.toml shows all there is.
        printf '[http]\nhost = "127.0.0.1"\nport = 8080\n' >"$configuration"
        worker=$(find_worker)
        [ -z "$worker" ] || printf '\n[worker]\npython = "%s"\n' "$worker" >>"$configuration"
        say "wrote $configuration; $source/systemd/hotspare.toml shows what else it can say"
    fi
    "$release/bin/hotspare" check-config --config "$configuration" >/dev/null || fail "the new version refuses $configuration; the one before goes on"
else
    for unit in hotspare-coordinator.service hotspare-nginx.path hotspare-nginx.service; do
        install -m 644 "$source/systemd/$unit" "$root/etc/systemd/system/"
    done
    [ -e "$root/etc/hotspare/coordinator.toml" ] || fail "write $root/etc/hotspare/coordinator.toml first; $source/systemd/coordinator.toml is an example"
fi

point_at() {
    ln -sfn "$1" "$home/current.new" && mv -T "$home/current.new" "$home/current"
    [ -e "$home/bin" ] || ln -s current/bin "$home/bin"
}
point_at "releases/$(basename "$release")"

if [ ! -d "$root/run/systemd/system" ]; then
    is_done=yes
    systemctl --root="$root/" --quiet enable "$service.service"
    say "installed; no systemd runs here, so it starts with the next boot"
    exit 0
fi
systemctl daemon-reload
systemctl enable --quiet "$service.service"
[ "$service" = hotspare ] || systemctl enable --quiet --now hotspare-nginx.path
if ! systemctl restart "$service.service"; then
    if [ -n "$before" ]; then
        point_at "$before"
        systemctl restart "$service.service" || true
        fail "$service did not come up with the new version, and runs with $before again; journalctl -u $service says why"
    fi
    is_done=yes
    fail "$service did not come up; journalctl -u $service says why"
fi
is_done=yes
# The one that serves and the one before are kept, to go back to by hand.
for old in "$home"/releases/*; do
    [ "$old" = "$release" ] || [ "releases/$(basename "$old")" = "$before" ] || rm -rf "$old"
done
say "$service runs; journalctl -u $service follows it"
