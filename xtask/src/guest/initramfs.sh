#!/bin/busybox sh
# First program of the guest: loads the virtio drivers, mounts the root disk and goes over to it.
/bin/busybox --install -s /bin
export PATH=/bin
mount -t devtmpfs dev /dev
mount -t proc proc /proc
for module in $(cat /modules/order); do
	insmod "/modules/$module.ko" || echo "GUEST insmod $module failed"
done

mode=rw
for word in $(cat /proc/cmdline); do
	case $word in
	ro | rw) mode=$word ;;
	esac
done

tries=0
while [ ! -b /dev/vda ]; do
	tries=$((tries + 1))
	if [ $tries -gt 100 ]; then
		echo "GUEST no /dev/vda; block devices:"
		ls -l /sys/block /dev
		poweroff -f
	fi
	sleep 0.1
done
mkdir -p /newroot
mount -t ext4 -o "$mode" /dev/vda /newroot || {
	echo "GUEST the root disk cannot be mounted"
	poweroff -f
}
umount /proc
mount --move /dev /newroot/dev
exec switch_root /newroot /sbin/init
