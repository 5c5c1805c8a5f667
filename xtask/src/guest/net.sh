# The networks' scenarios of the guest. Part of devices.sh, which has `say`, `try` and `wait_for_go`.

# The classic small machine: writes to its disk, takes a lease if it has a card, echoes what comes to port 22, and ends at a shell.
classic() {
	say "machine $(uname -m) $(cat /bin/busybox | head -c 5 | tail -c 1 | tr '\001\002' '12')"
	try test -b /dev/vda
	mke2fs -F /dev/vda >/dev/null 2>&1 || say "mke2fs failed"
	mount -t ext2 /dev/vda /mnt || mount -t ext4 /dev/vda /mnt || say "mount failed"
	numbers 1 100000 /mnt/numbers
	sync
	say "numbers $(md5sum </mnt/numbers)"
	umount /mnt && say "unmounted"
	if [ -d /sys/class/net/eth0 ]; then
		lease
		nc -ll -p 22 -e cat &
	fi
	say "shell"
	PS1='guest# ' setsid cttyhack sh
}

# Asks for an address by DHCP.
lease() {
	ip link set lo up
	try test -d /sys/class/net/eth0
	ip link set eth0 up
	udhcpc -i eth0 -n -q -f -t 20 -T 1 >/tmp/udhcpc 2>&1 || say "no lease: $(tail -1 /tmp/udhcpc)"
	say "lease $(cat /tmp/lease)"
}
