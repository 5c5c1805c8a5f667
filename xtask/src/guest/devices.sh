#!/bin/busybox sh
# First program of the guest of the devices' tests: does the scenario that the kernel's command line names by
# freestone.test=NAME, without a root disk. Lines that begin with GUEST are read by the tests.
/bin/busybox --install -s /bin
export PATH=/bin:/sbin:/usr/bin:/usr/sbin HOME=/root TERM=linux
mount -t devtmpfs dev /dev
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t tmpfs -o size=90% tmp /tmp
for module in $(cat /modules/order); do
	insmod "/modules/$module.ko" 2>/tmp/insmod || grep -q 'File exists' /tmp/insmod || echo "GUEST insmod $module failed"
done
scenario=shell
for word in $(cat /proc/cmdline); do
	case $word in
	freestone.test=*) scenario=${word#*=} ;;
	# The driver of this console is a module: when this script began, there was no console.
	console=hvc0) exec </dev/hvc0 >/dev/hvc0 2>&1 ;;
	esac
done

say() { echo "GUEST $*"; }

. /net.sh

stop() {
	sync
	say "stop"
	poweroff -f
	sleep 1000
}

# Tries a command until it succeeds, for some seconds.
try() {
	tries=0
	until "$@"; do
		tries=$((tries + 1))
		if [ $tries -gt 200 ]; then
			say "gave up on $*"
			stop
		fi
		sleep 0.1
	done
}

# Waits for the line "go" on the console.
wait_for_go() {
	say "ready $1"
	while read -r line; do
		case $line in
		*go*) return ;;
		esac
	done
}

kib() { grep "^$1:" /proc/meminfo | tr -s ' ' | cut -d' ' -f2; }

numbers() { seq "$1" "$2" >"$3"; }

filesystem() {
	try test -b /dev/vda
	mkfs.ext4 -q -E nodiscard /dev/vda || say "mkfs failed"
	mount -t ext4 /dev/vda /mnt || say "mount failed"
	numbers 1 100000 /mnt/numbers
	dd if=/dev/urandom of=/mnt/big bs=1M count=16 2>/dev/null
	sync
	say "allocated $(df -k /mnt | tail -1 | tr -s ' ' | cut -d' ' -f3)"
	rm /mnt/big
	sync
	fstrim -v /mnt && say "trimmed"
	say "numbers $(md5sum </mnt/numbers)"
	umount /mnt && say "unmounted"
}

# Prints how many bytes of /dev/vdb at MiB $1 are not zero.
dirty_bytes() { dd if=/dev/vdb bs=1M skip="$1" count=4 2>/dev/null | tr -d '\0' | wc -c; }

zeroing() {
	try test -b /dev/vdb
	say "before $(dirty_bytes 4) $(dirty_bytes 12)"
	# By its path: the shell has one built in that knows less.
	/usr/sbin/blkdiscard -o $((4 << 20)) -l $((4 << 20)) /dev/vdb && say "discarded"
	/usr/sbin/blkdiscard -z -o $((12 << 20)) -l $((4 << 20)) /dev/vdb && say "zeroed"
	# This asks for write-zeroes as well, and allows that the storage is given back.
	/usr/bin/fallocate -p -o $((20 << 20)) -l $((4 << 20)) /dev/vdb && say "punched"
	sync
	echo 3 >/proc/sys/vm/drop_caches
	say "after $(dirty_bytes 4) $(dirty_bytes 12) $(dirty_bytes 20) kept $(dirty_bytes 28)"
}

# Four writers on each disk, each with data of its own, then all of it is read back past the cache.
load() {
	for disk in vda vdb; do
		try test -b /dev/$disk
		say "queues $disk $(ls /sys/block/$disk/mq | wc -l)"
		for part in 0 1 2 3; do
			(
				seq $((part * 1000000)) $((part * 1000000 + 400000)) | head -c 1048576 >/tmp/$disk.$part
				dd if=/tmp/$disk.$part of=/dev/$disk bs=16k seek=$((part * 256)) conv=notrunc,fsync 2>/dev/null
			) &
		done
	done
	wait
	sync
	echo 3 >/proc/sys/vm/drop_caches
	for disk in vda vdb; do
		for part in 0 1 2 3; do
			dd if=/dev/$disk bs=16k skip=$((part * 256)) count=64 2>/dev/null | cmp - /tmp/$disk.$part &&
				say "same $disk.$part $(md5sum </tmp/$disk.$part)"
		done
	done
}

resize() {
	try test -b /dev/vda
	say "size $(blockdev --getsize64 /dev/vda)"
	old=$(cat /sys/block/vda/size)
	wait_for_go resize
	try changed /sys/block/vda/size "$old"
	say "size $(blockdev --getsize64 /dev/vda)"
	last=$(($(cat /sys/block/vda/size) - 1))
	printf 'the last sector' | dd of=/dev/vda bs=512 seek=$last conv=notrunc,fsync 2>/dev/null && say "last sector written"
}

changed() { [ "$(cat "$1")" != "$2" ]; }

rng() {
	say "rng $(cat /sys/class/misc/hw_random/rng_current)"
	dd if=/dev/hwrng of=/tmp/one bs=64 count=8 2>/dev/null
	dd if=/dev/hwrng of=/tmp/two bs=64 count=8 2>/dev/null
	say "bytes $(wc -c </tmp/one) $(wc -c </tmp/two)"
	cmp -s /tmp/one /tmp/two || say "they differ"
}

more_than() { [ "$(kib "$1")" -gt "$2" ]; }
less_than() { [ "$(kib "$1")" -lt "$2" ]; }

balloon() {
	dd if=/dev/zero of=/tmp/fill bs=1M count=64 2>/dev/null
	wait_for_go filled
	rm /tmp/fill
	free=$(kib MemFree)
	say "free $free"
	wait_for_go inflate
	try less_than MemFree $((free - 50000))
	say "free $(kib MemFree)"
	wait_for_go deflate
	try more_than MemFree $((free - 10000))
	dd if=/dev/zero of=/tmp/fill bs=1M count=64 2>/dev/null && say "memory is back"
	rm /tmp/fill
	wait_for_go reported
}

memory() {
	total=$(kib MemTotal)
	say "total $total"
	wait_for_go plug
	try more_than MemTotal $((total + 100000))
	say "total $(kib MemTotal)"
	mount -t tmpfs -o size=95% fill /mnt
	dd if=/dev/zero of=/mnt/fill bs=1M count=150 2>/dev/null && say "filled"
	rm /mnt/fill
	wait_for_go unplug
	try less_than MemTotal $((total + 5000))
	say "total $(kib MemTotal)"
	wait_for_go unplugged
}

pmem() {
	try test -b /dev/pmem0
	mkfs.ext4 -q -b 4096 /dev/pmem0 || say "mkfs failed"
	mount -t ext4 -o dax /dev/pmem0 /mnt || say "mount failed"
	say "mounted $(grep ' /mnt ' /proc/mounts)"
	numbers 1 20000 /mnt/numbers
	sync
	say "numbers $(md5sum </mnt/numbers)"
	umount /mnt && say "unmounted"
}

errors() {
	try test -b /dev/vda
	wait_for_go errors
	dd if=/dev/urandom of=/dev/vda bs=64k count=400 conv=notrunc,fsync 2>/dev/null && say "no error" || say "write refused"
	dd if=/dev/vda of=/dev/null bs=4k count=1 2>/dev/null && say "still reads"
}

shrunk() {
	try test -b /dev/vda
	wait_for_go shrink
	dd if=/dev/vda of=/dev/null bs=4k skip=1024 count=1 iflag=direct 2>/dev/null && say "no error" || say "read refused"
	dd if=/dev/vda of=/dev/null bs=4k count=1 iflag=direct 2>/dev/null && say "still reads"
}

# Lives until it is told to end; what it does is in the program.
life() {
	try test -b /dev/vda
	mkfs.ext4 -q -E nodiscard /dev/vda || say "mkfs failed"
	mount -t ext4 /dev/vda /mnt || say "mount failed"
	lease eth0
	tool life guest --dir /mnt --vsock 5000 --tcp "10.0.2.2:$ECHO"
	umount /mnt && say "unmounted"
}

say "up $(uname -r) cpus=$(nproc) transport=$(ls /sys/bus/virtio/devices/virtio0/device/driver -d 2>/dev/null | wc -l) $(ls /sys/bus/pci/devices 2>/dev/null | wc -l) pci"
case $scenario in
filesystem | zeroing | load | resize | rng | balloon | memory | pmem | errors | shrunk | life) $scenario ;;
vsock) tool vsock guest 32 ;;
classic) classic ;;
net_*) $scenario ;;
hvc)
	say "console $(cat /sys/class/tty/console/active)"
	say "size $(stty size </dev/hvc0)"
	;;
write)
	# Writes until it is killed; says which block is durable.
	try test -b /dev/vda
	n=0
	while :; do
		n=$((n + 1))
		seq $n 100000 | head -c 65536 | dd of=/dev/vda bs=64k seek=$((n * 7 % 500)) conv=notrunc,fsync 2>/dev/null
		say "durable $n"
	done
	;;
shell)
	setsid cttyhack sh
	;;
*) say "unknown scenario $scenario" ;;
esac
stop
