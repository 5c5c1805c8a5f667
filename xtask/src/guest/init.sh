#!/bin/sh
# First program of the root disk: does the scenario that the kernel's command line names by freestone.test=NAME.
# Lines that begin with GUEST are read by the tests.
export PATH=/bin:/sbin HOME=/root TERM=linux
mount -t proc proc /proc
mount -t sysfs sys /sys
cd /

say() { echo "GUEST $*"; }

# Leaves the file system clean and ends the machine by poweroff or reboot.
stop() {
	sync
	mount -o remount,ro / || say "remount failed"
	say "stop $1"
	"$1" -f
	sleep 1000
}

write_files() {
	mkdir -p /data
	echo "written by the guest" >/data/hello
	seq 1 20000 >/data/numbers
	sync
	say "numbers $(md5sum </data/numbers)"
}

scenario=shell
for word in $(cat /proc/cmdline); do
	case $word in
	freestone.test=*) scenario=${word#*=} ;;
	esac
done
say "up $(uname -r) cpus=$(nproc) root=$(grep ' / ext4 ' /proc/mounts | cut -d' ' -f1)"

case $scenario in
poweroff | reboot)
	write_files
	stop "$scenario"
	;;
panic)
	write_files
	say "panic"
	echo c >/proc/sysrq-trigger
	;;
memory)
	say "$(grep MemTotal /proc/meminfo)"
	grep 'System RAM' /proc/iomem | while read -r range rest; do say "ram $range"; done
	stop poweroff
	;;
disks)
	for disk in /sys/block/vd*; do
		say "disk ${disk##*/} sectors=$(cat "$disk/size") ro=$(cat "$disk/ro")"
	done
	if [ -b /dev/vdb ]; then
		say "vdb was $(dd if=/dev/vdb bs=16 count=1 2>/dev/null)"
		printf 'from the guest!!' | dd of=/dev/vdb bs=16 conv=fsync 2>/dev/null && say "vdb written"
	fi
	if dd if=/dev/zero of=/dev/vda bs=512 count=1 conv=fsync,notrunc 2>/dev/null; then
		say "vda takes writes"
	else
		say "vda refuses writes"
	fi
	stop poweroff
	;;
demo)
	say "the kernel's view of the machine:"
	cat /proc/version
	grep -E 'model name|hypervisor' /proc/cpuinfo | sort | uniq -c | cut -c1-100
	free -m
	cat /proc/partitions
	cat /proc/interrupts
	df -h /
	write_files
	ls -l /data
	stop poweroff
	;;
shell)
	say "shell"
	setsid cttyhack sh
	stop poweroff
	;;
*)
	say "unknown scenario $scenario"
	stop poweroff
	;;
esac
