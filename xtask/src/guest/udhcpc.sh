#!/bin/busybox sh
# What udhcpc does with a lease.
case $1 in
deconfig)
	# Not the IPv6 addresses: without one of the link, the router is not asked for its advertisement.
	ip -4 addr flush dev "$interface"
	ip link set "$interface" up
	;;
bound | renew)
	ip addr replace "$ip/$mask" dev "$interface" 2>/dev/null || ip addr add "$ip/$mask" dev "$interface"
	[ -n "$router" ] && ip route add default via "${router%% *}" dev "$interface"
	: >/etc/resolv.conf
	for server in $dns; do echo "nameserver $server" >>/etc/resolv.conf; done
	echo "$ip/$mask router=$router dns=$dns domain=$domain host=$hostname mtu=$mtu" >/tmp/lease
	;;
esac
exit 0
