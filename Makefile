# Every target sets up what it needs: a virtual environment in .venv, and programs of the distribution through apt where they are missing.

PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11 python3.10; do $$p -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null && echo $$p && break; done)
PYTHON38 ?= $(shell for p in python3.8 $$HOME/.pyenv/versions/3.8*/bin/python; do $$p -c 'import sys; sys.exit(sys.version_info[:2] != (3, 8))' 2>/dev/null && echo $$p && break; done)
BIN := .venv/bin
# Tests wait for cameras, brokers and processes more than they compute: one process of them more than there are cores, six at most.
JOBS ?= $(shell cores=$$(nproc 2>/dev/null || echo 1); echo $$((cores < 5 ? cores + 1 : 6)))
SUDO := $(shell [ "$$(id -u)" = 0 ] || echo sudo)
PROGRAMS := mosquitto nginx
TEST_PROGRAMS := $(PROGRAMS) chromium chromedriver systemd-analyze redis-server cc

.PHONY: run test test-slow test-convert test-py38 python38 test-gpu lint bench clean programs test-programs

run: .venv/.ready programs  ## start the demo: the whole product on this machine
	$(BIN)/hotspare demo

test: .venv/.ready test-programs  ## the tests, with real brokers, balancers, workers, browser and weights
	@$(call pytest,$(BIN)/python,-n $(JOBS) --dist loadfile $(TESTS))

test-slow: TESTS := --run-slow
test-slow: test  ## also the tests that take minutes

test-convert: .venv-convert/.ready  ## the exporters against torch and transformers: about 1 GB of packages, in an environment of their own
	@$(call pytest,.venv-convert/bin/python,-o cache_dir=.venv-convert/pytest tests/converters/transformers)

test-py38: .venv-py38/.ready test-programs  ## the data plane under the interpreter of JetPack 5, in an environment of its own
	@$(call pytest,.venv-py38/bin/python,-o cache_dir=.venv-py38/pytest tests/models tests/agent/worker tests/agent/test_worker_protocol.py tests/converters/tensorrt tests/conformance)

python38:
	@echo "$(PYTHON38)"

test-gpu: .venv/.ready  ## engines on the NVIDIA GPU of this machine; with pycuda where nvcc can build it
	@! command -v nvcc >/dev/null || $(BIN)/python -c 'import pycuda' 2>/dev/null || $(BIN)/python -m pip install --quiet --disable-pip-version-check 'pycuda>=2022.1'
	$(BIN)/python -m pytest -m gpu tests/gpu

lint: .venv/.ready
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

bench: .venv/.ready programs  ## figures against the peers that are installed; tables here, JSON in bench/results
	mkdir -p bench/results
	$(BIN)/python -m bench.text --json bench/results/text.json
	$(BIN)/python -m bench.vision $(if $(wildcard .venv-convert/.ready),--peer-python .venv-convert/bin/python) --json bench/results/vision.json
	$(BIN)/python -m bench.tracking
	$(BIN)/python -m bench.memory --json bench/results/memory.json
	$(BIN)/python -m bench.mqtt --json bench/results/mqtt.json
	$(BIN)/python -m bench.gateway --json bench/results/gateway.json

clean:
	rm -rf .venv .venv-convert .venv-py38 .cache .pytest_cache .mypy_cache .ruff_cache

.venv/.ready: pyproject.toml
	@test -n "$(PYTHON)" || { echo "hotspare needs Python 3.10 or newer; none was found. Set PYTHON=/path/to/python3.1x"; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { echo "installing python3-venv through apt"; $(SUDO) apt-get update -qq && $(SUDO) apt-get install -y -qq python3-venv; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[cpu,dev]'
	@touch $@

.venv-convert/.ready: pyproject.toml
	$(PYTHON) -m venv .venv-convert
	.venv-convert/bin/python -m pip install --quiet --disable-pip-version-check --editable '.[cpu,dev,convert]'
	@touch $@

.venv-py38/.ready: tests/python38.txt
	@test -n "$(PYTHON38)" || { echo "no python3.8 was found; set PYTHON38=/path/to/python3.8"; exit 1; }
	$(PYTHON38) -m venv .venv-py38
	.venv-py38/bin/python -m pip install --quiet --disable-pip-version-check --upgrade 'setuptools>=61' wheel
	.venv-py38/bin/python -m pip install --quiet --disable-pip-version-check --no-build-isolation --requirement tests/python38.txt
	@touch $@

programs:
	@$(call install,$(PROGRAMS))

# No program of its own: the RTSP server of the camera tests is GStreamer's, driven by the system's Python.
RTSP_PACKAGES := python3-gi gir1.2-gst-rtsp-server-1.0 gir1.2-gst-plugins-base-1.0 gstreamer1.0-plugins-base gstreamer1.0-plugins-good gstreamer1.0-plugins-bad
HAS_RTSP := import gi; gi.require_version("GstRtspServer", "1.0"); from gi.repository import Gst; Gst.init(None); assert Gst.ElementFactory.find("openh264enc")

test-programs:
	@$(call install,$(TEST_PROGRAMS))
	@/usr/bin/python3 -c '$(HAS_RTSP)' 2>/dev/null || { echo "installing through apt: $(RTSP_PACKAGES)"; $(SUDO) apt-get update -qq && DEBIAN_FRONTEND=noninteractive $(SUDO) apt-get install -y -qq --no-install-recommends $(RTSP_PACKAGES) >/dev/null; }

# $(call install,programs): apt packages for those that are missing; Debian keeps daemons in /usr/sbin.
define install
missing=""; for p in $(1); do PATH="$$PATH:/usr/sbin:/usr/local/sbin" command -v $$p >/dev/null || missing="$$missing $$p"; done; \
packages=$$(echo "$$missing" | sed 's/chromedriver/chromium-driver/; s/systemd-analyze/systemd/; s/nginx/nginx-light/; s/ cc\b/ gcc libc6-dev/'); \
[ -z "$$packages" ] || { echo "installing through apt:$$packages"; $(SUDO) apt-get update -qq && DEBIAN_FRONTEND=noninteractive $(SUDO) apt-get install -y -qq --no-install-recommends $$packages >/dev/null; }
endef

# $(call pytest,interpreter,arguments): what failed is run once more, in one process. Cameras, brokers and workers live by real time, and a machine that stood
# still for a second is no fault of theirs; what fails twice is one, and what failed once is still in the first summary.
define pytest
$(1) -m pytest $(2) || { [ $$? = 1 ] && echo "once more, what failed:" && $(1) -m pytest --last-failed --last-failed-no-failures none $(filter-out -n $(JOBS) --dist loadfile,$(2)); }
endef
