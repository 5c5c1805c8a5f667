#!/bin/busybox sh
# First program of the lab's machine: loads KVM and the port's driver, then runs the agent or a shell.
/bin/busybox --install -s /bin
export PATH=/bin:/sbin:/usr/bin:/usr/sbin HOME=/root TERM=linux PS1='lab# '
mkdir -p /dev /proc /sys /tmp /root /run
mount -t devtmpfs dev /dev
mkdir -p /dev/pts /dev/shm
mount -t devpts devpts /dev/pts
mount -t tmpfs shm /dev/shm
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t tmpfs -o size=90% tmp /tmp
ip link set lo up
for module in $(cat /modules/order); do
	insmod "/modules/$module.ko" || echo "lab: insmod $module failed"
done
cd /root
case " $(cat /proc/cmdline) " in
*" lab.shell "*)
	echo "This is the lab's host. Guest files are in /lab; leave with: exit"
	stty rows 50 cols 160
	setsid cttyhack sh
	;;
*)
	/bin/xtask agent /dev/vport0p1
	;;
esac
poweroff -f
