"""Leads a machine through its life by a client that knows nothing of Freestone. Its own words are all of this file's."""

import signal
import socket
import subprocess
import sys
import time

from firecracker.api import Api


PROCESSES = []


def listens(path):
    with socket.socket(socket.AF_UNIX) as client:
        return client.connect_ex(path) == 0


def give_up(*_):
    raise TimeoutError("it takes too long")


class Vmm:
    def __init__(self, name):
        # Relative: the SDK makes a host of the path, in small letters.
        self.socket = name + ".sock"
        path = ["./firecracker", "--api-sock", self.socket, "--id", name]
        self.process = subprocess.Popen(path, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        PROCESSES.append(self.process)
        while not listens(self.socket):
            assert self.process.poll() is None, "it ended"
            time.sleep(0.01)
        self.api = Api(self.socket)

    def echoes(self, text):
        self.process.stdin.write(text + "\n")
        self.process.stdin.flush()
        for line in self.process.stdout:
            if "echo: " + text in line:
                return
        raise AssertionError(text + " was not echoed")

    def state(self):
        return self.api.describe.get().json()["state"]

    def quits(self):
        self.process.stdin.write("quit\n")
        self.process.stdin.flush()
        assert self.process.wait(timeout=60) == 0
        self.api.close()


def refused(call, part):
    try:
        call()
    except Exception as error:
        assert part in str(error), error
    else:
        raise AssertionError("it was not refused: " + part)


def main():
    vmm = Vmm("one")
    api = vmm.api
    assert api.version.get().json()["firecracker_version"]
    assert vmm.state() == "Not started"
    api.machine_config.put(vcpu_count=1, mem_size_mib=64, track_dirty_pages=True)
    api.boot.put(kernel_image_path="echo", boot_args="quiet")
    api.drive.put(drive_id="disk", path_on_host="disk.img", is_root_device=False, is_read_only=False)
    api.network.put(iface_id="eth0", host_dev_name="freestone:user")
    api.mmds_config.put(version="V2", network_interfaces=["eth0"])
    api.mmds.put(latest={"meta-data": {"name": "one"}})
    api.vsock.put(guest_cid=3, uds_path="one.v")
    refused(lambda: api.machine_config.put(vcpu_count=0, mem_size_mib=64), "vcpu_count")
    refused(lambda: api.vm.patch(state="Paused"), "fault")
    api.actions.put(action_type="InstanceStart")
    assert vmm.state() == "Running"
    vmm.echoes("a")
    api.drive.patch(drive_id="disk", path_on_host="other.img")
    api.mmds.patch(latest={"meta-data": {"name": "two"}})
    assert api.mmds.get().json() == {"latest": {"meta-data": {"name": "two"}}}
    assert api.vm_config.get().json()["drives"][0]["path_on_host"] == "other.img"
    api.vm.patch(state="Paused")
    assert vmm.state() == "Paused"
    api.create_snapshot.put(mem_file_path="mem", snapshot_path="state", snapshot_type="Full")
    api.vm.patch(state="Resumed")
    vmm.echoes("b")
    vmm.quits()

    vmm = Vmm("two")
    memory = {"backend_type": "File", "backend_path": "mem"}
    refused(lambda: vmm.api.load_snapshot.put(snapshot_path="none", mem_backend=memory), "snapshot_path")
    vmm.api.load_snapshot.put(snapshot_path="state", mem_backend=memory, resume_vm=False)
    assert vmm.state() == "Paused"
    vmm.api.vm.patch(state="Resumed")
    vmm.echoes("c")
    vmm.quits()
    print("the whole life")


signal.signal(signal.SIGALRM, give_up)
signal.alarm(180)
try:
    sys.exit(main())
finally:
    # Whoever reads their output waits for their end.
    for process in PROCESSES:
        process.kill()
