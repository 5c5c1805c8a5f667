# The networks' scenarios of the guest. Part of devices.sh, which has `say`, `try` and `wait_for_go`.

# The servers beside the guest, and inside of it.
ECHO=7007
HTTP=8080
SINK=9000

# A word of the kernel's command line: freestone.NAME=VALUE.
option() { tr ' ' '\n' </proc/cmdline | grep "^freestone.$1=" | cut -d= -f2; }

# Waits for a card and brings it up.
card() {
	ip link set lo up
	try test -d "/sys/class/net/$1"
	ip link set "$1" up
}

# Asks for an address by DHCP.
lease() {
	card "$1"
	rm -f /tmp/lease
	udhcpc -i "$1" -n -q -f -t 20 -T 1 >/tmp/udhcpc 2>&1 || say "no lease: $(tail -1 /tmp/udhcpc)"
	say "lease $1 $(cat /tmp/lease)"
}

# Says what a program prints in one line, and how many seconds it took.
told() {
	what=$1
	shift
	start=$(cut -d. -f1 /proc/uptime)
	said=$("$@" 2>&1 | tail -1)
	say "$what $said; $(($(cut -d. -f1 /proc/uptime) - start)) s"
}

# The same for a program that says its line itself.
timed() {
	start=$(cut -d. -f1 /proc/uptime)
	"$@"
	say "$2 $3 took $(($(cut -d. -f1 /proc/uptime) - start)) s"
}

pings() { ping -c 3 -W 5 "$1" | grep -o '[0-9]* packets received'; }
download() { wget -q -O - "http://$1:$HTTP/$2/1" | tool net check "$2" 1; }

# The servers of the guest, until it stops.
serve() {
	tool net serve --until-gone /proc/1 "$@" >/tmp/serve.log &
	try grep -q serving /tmp/serve.log
}

# All there is to do with a host at address $1: $2 bytes from there, and an eighth of that there.
traffic() {
	told "ping" pings "$1"
	told "download" download "$1" "$2"
	told "upload" tool net send "$1:$SINK" $(($2 / 8)) 2
	told "echo tcp" tool net echo tcp "$1:$ECHO" --count 20 --bytes 100000
	told "echo udp" tool net echo udp "$1:$ECHO" --count 20 --bytes 1400
	# These are sent in fragments.
	told "echo large" tool net echo udp "$1:$ECHO" --count 5 --bytes 8000
}

# The classic small machine: writes to its disk, takes a lease if it has a card, echoes what comes to port 22, and ends at a shell.
classic() {
	# The byte in the program's header that says its class: 1 for 32 bits, 2 for 64.
	say "machine $(uname -m) $(head -c 5 /bin/busybox | tail -c 1 | tr '\001\002' '12')"
	try test -b /dev/vda
	mke2fs -F /dev/vda >/dev/null 2>&1 || say "mke2fs failed"
	mount -t ext2 /dev/vda /mnt || mount -t ext4 /dev/vda /mnt || say "mount failed"
	numbers 1 100000 /mnt/numbers
	sync
	say "numbers $(md5sum </mnt/numbers)"
	umount /mnt && say "unmounted"
	if [ "$(option net)" = on ]; then
		lease eth0
		told "ping" pings 10.0.2.2
		nc -ll -p 22 -e cat &
	fi
	say "shell"
	PS1='guest# ' setsid cttyhack sh
}

# A network of its own: DHCP, DNS, both ways of TCP and UDP, IPv6.
net_user() {
	lease eth0
	say "name $(nslookup files.test | grep -A 1 '^Name' | grep -o 'Address: .*')"
	say "no name $(nslookup nowhere.test 2>&1 | grep -c NXDOMAIN)"
	traffic 10.0.2.2 $(($(option mib) << 20))
	told "by name" download files.test 100000
	# A router advertisement gives the network, and the card makes its address in it.
	try sh -c 'ip -6 addr show dev eth0 scope site | grep -q fec0 && ! ip -6 addr show dev eth0 | grep -q tentative'
	say "address $(ip -6 addr show dev eth0 | grep -o 'fec0[^ ]*')"
	told "echo tcp6" tool net echo tcp "[fec0::2]:$ECHO" --count 5 --bytes 100000
	told "echo udp6" tool net echo udp "[fec0::2]:$ECHO" --count 5 --bytes 1200
	# For both families.
	serve "echo@[::]:22" "udp-echo@[::]:23"
	wait_for_go forwards
}

# Three cards with a policy each. The way to what is beyond the gateways leads through one card after the other.
net_policy() {
	lease eth0
	say "restricted name $(nslookup files.test 10.0.2.3 2>&1 | grep -c 'Address: 10')"
	reach() { tool net probe "$@" | sed "s/GUEST probe/GUEST $card/"; }
	card=eth0
	ip route replace 192.0.2.0/24 via 10.0.2.2
	reach 10.0.2.2:$ECHO 10.0.2.3:$ECHO 10.0.2.255:$ECHO 192.0.2.1:$ECHO 192.0.2.2:$ECHO 10.0.2.100:80 "[fec0::2]:$ECHO" \
		"[fec0::3]:$ECHO" "[::ffff:10.0.2.2]:$ECHO" "[::ffff:192.0.2.1]:$ECHO"
	reach 240.0.0.1:$ECHO 169.254.169.254:80
	for card in eth1 eth2; do
		lease $card
		net=10.0.$((${card#eth} + 2))
		ip route replace 192.0.2.0/24 via $net.2
		reach $net.2:$ECHO $net.2:$HTTP 192.0.2.1:$ECHO 192.0.2.2:$ECHO
	done
	card=eth0
	ip route del 192.0.2.0/24
	tool net garbage eth0 --frames 2000
	reach 10.0.2.100:80
	serve echo@0.0.0.0:22
	wait_for_go forwards
}

# A network that two machines share: number 1 serves, number 2 asks and ends.
net_lan() {
	me=$(option me)
	card eth0
	ip addr add "10.9.0.$me/24" dev eth0
	if [ "$me" = 1 ]; then
		serve echo@0.0.0.0:$ECHO udp-echo@0.0.0.0:$ECHO http@0.0.0.0:$HTTP sink@0.0.0.0:$SINK
		wait_for_go peer
		say "served $(grep -c from /tmp/serve.log)"
	else
		try sh -c 'ping -c 1 -W 2 10.9.0.1 >/dev/null'
		traffic 10.9.0.1 $(($(option mib) << 20))
		say "done"
	fi
}

# The card's queues for frames that come in, and how many of them have interrupted.
queues() {
	cpus=$(nproc)
	used=$(awk -v cpus="$cpus" '/-input\./ { n = 0; for (i = 2; i <= cpus + 1; i++) n += $i; if (n) used++ } END { print used + 0 }' /proc/interrupts)
	say "queues $(ls -d /sys/class/net/eth0/queues/rx-* | wc -l) used $used"
}

# A tap: the host is at 10.8.0.1.
net_tap() {
	card eth0
	ip addr add 10.8.0.2/24 dev eth0
	try sh -c 'ping -c 1 -W 2 10.8.0.1 >/dev/null'
	traffic 10.8.0.1 $(($(option mib) << 20))
	serve echo@0.0.0.0:22 udp-echo@0.0.0.0:23
	wait_for_go forwards
	queues
}

# A network by passt, whose gateway is the host's loopback. No connection here is ended by the guest first: Debian 12's passt
# may then keep the end of what comes from the server to itself.
net_passt() {
	lease eth0
	told "download" download 192.0.2.254 $(($(option mib) << 20))
	told "both ways" tool net hold "192.0.2.254:$ECHO" --bytes $(($(option mib) << 20)) --until-gone /gone
	told "echo udp" tool net echo udp 192.0.2.254:$ECHO --count 20 --bytes 1400
	serve echo@0.0.0.0:22 udp-echo@0.0.0.0:23
	wait_for_go forwards
}

# Does to its network whatever a guest can do, and then uses it as others do.
net_hostile() {
	lease eth0
	told "before" tool net echo tcp 10.0.2.2:$ECHO --count 5 --bytes 100000
	timed tool net garbage eth0 --frames 10000 --seed 3
	timed tool net flood 10.0.2.2:$ECHO --connections 10000
	told "after" tool net echo tcp 10.0.2.2:$ECHO --count 5 --bytes 100000
	told "upload" tool net send "10.0.2.2:$SINK" 1000000 2
	lease eth0
	wait_for_go counters
}

# Does ordinary work until the host says that it is enough.
net_steady() {
	lease eth0
	while :; do
		told "steady" tool net echo tcp 10.0.2.2:$ECHO --count 20 --bytes 10000
		# The machines share a processor.
		sleep 1
	done
}
