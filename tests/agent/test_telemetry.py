"""Telemetry from fake /proc and /sys trees, and from the machine the test runs on."""

from __future__ import annotations

from pathlib import Path

import pytest

from agent.protocol.messages import HttpLoad
from agent.telemetry.generic import Generic, boot_clock_s, clock_is_synced, kernel_boot_id
from agent.telemetry.jetson import gpu_percent, is_throttled, l4t_version, module_name, power_mode, power_w
from agent.telemetry.sensors import hardware, open_sensors, software

ORIN = {
    "etc/nv_tegra_release": "# R36 (release), REVISION: 4.0, GCID: 37537400, BOARD: generic, EABI: aarch64\n",
    "proc/device-tree/model": "NVIDIA Jetson Orin NX Engineering Reference Developer Kit\0",
    "proc/stat": "cpu  100 0 100 700 100 0 0 0 0 0\ncpu0 1 1 1 1\n",
    "proc/meminfo": "MemTotal:       16032768 kB\nMemFree:  1 kB\nMemAvailable:   10032768 kB\n",
    "sys/devices/virtual/thermal/thermal_zone0/type": "cpu-thermal\n",
    "sys/devices/virtual/thermal/thermal_zone0/temp": "51234\n",
    "sys/devices/virtual/thermal/thermal_zone1/type": "GPU-therm\n",
    "sys/devices/virtual/thermal/thermal_zone1/temp": "-256000\n",  # off
    "sys/devices/virtual/thermal/cooling_device0/type": "pwm-fan\n",
    "sys/devices/virtual/thermal/cooling_device0/cur_state": "3\n",
    "sys/devices/virtual/thermal/cooling_device1/type": "cpu-throttle-alert\n",
    "sys/devices/virtual/thermal/cooling_device1/cur_state": "0\n",
    "sys/class/devfreq/17000000.gpu/device/of_node/name": "ga10b\0",
    "sys/class/devfreq/17000000.gpu/device/load": "623\n",
    "sys/class/devfreq/15340000.vic/device/of_node/name": "vic\0",
    "sys/bus/i2c/devices/1-0040/name": "ina3221\n",
    "sys/bus/i2c/devices/1-0040/hwmon/hwmon3/in1_label": "VDD_IN\n",
    "sys/bus/i2c/devices/1-0040/hwmon/hwmon3/in1_input": "5000\n",
    "sys/bus/i2c/devices/1-0040/hwmon/hwmon3/curr1_input": "2400\n",
    "sys/bus/i2c/devices/1-0040/hwmon/hwmon3/in2_label": "VDD_CPU_GPU_CV\n",
    "sys/bus/i2c/devices/1-0040/hwmon/hwmon3/in2_input": "5000\n",
    "sys/bus/i2c/devices/1-0040/hwmon/hwmon3/curr2_input": "1000\n",
    "sys/bus/i2c/devices/1-0040/hwmon/hwmon3/in3_label": "NC\n",
    "sys/bus/i2c/devices/1-0040/hwmon/hwmon3/in3_input": "5000\n",
    "sys/bus/i2c/devices/1-0040/hwmon/hwmon3/curr3_input": "1000\n",
}


@pytest.fixture
def orin(tmp_path: Path) -> Path:
    for name, text in ORIN.items():
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return tmp_path


def test_a_node_says_what_it_is(orin: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    told = hardware(orin)
    assert (told.module, told.mem_mb) == ("NVIDIA Jetson Orin NX Engineering Reference Developer Kit", 15657)
    assert software(orin) == {"l4t": "36.4.0"}
    nothing = tmp_path_factory.mktemp("nothing")
    assert (hardware(nothing).module, hardware(nothing).mem_mb, software(nothing)) == ("unknown", None, {})


def test_a_jetson_is_read_from_sysfs(orin: Path) -> None:
    read = open_sensors(orin)
    read()
    (orin / "proc/stat").write_text("cpu  150 0 150 800 100 0 0 0 0 0\n")
    reading = read()
    assert reading.cpu_percent == 50.0
    assert reading.gpu_percent == 62.3
    assert (reading.memory_used_mb, reading.memory_total_mb) == (5859, 15657)
    assert reading.temperatures_c == {"cpu": 51.2}
    assert reading.power_w == 12.0
    assert reading.is_throttled is False
    assert (module_name(orin), l4t_version(orin)) == ("NVIDIA Jetson Orin NX Engineering Reference Developer Kit", "36.4.0")
    assert reading.heartbeat(HttpLoad()).gpu == 62.3


def test_without_a_total_rail_the_rails_are_summed(orin: Path) -> None:
    (orin / "sys/bus/i2c/devices/1-0040/hwmon/hwmon3/in1_label").write_text("GPU\n")
    assert power_w(orin) == 17.0


def test_a_throttling_device_in_action_is_seen(orin: Path) -> None:
    (orin / "sys/devices/virtual/thermal/cooling_device1/cur_state").write_text("1\n")
    assert is_throttled(orin) is True


def test_what_is_absent_or_garbled_is_none_and_not_an_error(orin: Path) -> None:
    (orin / "sys/class/devfreq/17000000.gpu/device/load").write_text("busy\n")
    assert gpu_percent(orin) is None
    empty = Generic(orin / "nowhere").read()
    assert (empty.cpu_percent, empty.memory_used_mb, empty.temperatures_c, empty.power_w) == (None, None, {}, None)


@pytest.mark.parametrize(
    ("text", "expected"),
    [("NV Power Mode: MAXN\n0\n", ("MAXN", 0)), ("NVPM WARN: x\nNV Power Mode: 15W\n2\n", ("15W", 2)), ("nvpmodel: not found", None)],
)
def test_the_power_mode_is_read_from_nvpmodel(text: str, expected: tuple[str, int] | None) -> None:
    assert power_mode(text) == expected


def test_this_machine_is_read_too() -> None:
    read = open_sensors()
    read()
    reading = read()
    assert reading.memory_total_mb and reading.memory_used_mb and reading.memory_used_mb < reading.memory_total_mb
    assert kernel_boot_id() == kernel_boot_id()
    assert 0 < boot_clock_s() <= boot_clock_s()
    assert clock_is_synced() in (True, False)
