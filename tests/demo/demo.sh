#!/bin/bash
# The demo's part inside the rig: one sandbox from create to destroy, then what roost left in the kernel.
# Its status is 0 only when every step worked and every count is 0.
set -uo pipefail
failures=0

PROGRAM='
i=0; sum=0
while [ $i -lt 20 ]; do i=$((i + 1)); sum=$((sum + i * i)); done
echo "1 + 4 + ... + 400 = $sum"
echo "I am $(id -un) on $(. /etc/os-release; echo "$PRETTY_NAME"), PID 1 is $(cat /proc/1/comm)"
awk "/MemTotal/ { print \"memory:\", int(\$2 / 1024), \"MiB\" }" /proc/meminfo
'

# A title, then the command's own output, then how long it took.
step() {
    local title=$1 start=$EPOCHREALTIME status
    shift
    printf '\n--- %s\n$ %s\n' "$title" "$*"
    "$@"
    status=$?
    printf '    (%s s, status %d)\n' "$(since "$start")" "$status"
    if [ "$status" -ne 0 ]; then
        failures=$((failures + 1))
    fi
    return "$status"
}
since() {
    awk -v now="$EPOCHREALTIME" -v then="$1" 'BEGIN { printf "%.2f", now - then }'
}

# Counts of all that a sandbox consists of, one "name number" a line.
census() {
    local vms="roost-vmmshim|standin-vmm|cloud-hypervis|qemu-system-x86"
    echo "dm devices" "$(dmsetup ls 2>/dev/null | grep -c '^roost-')"
    echo "loops" "$(losetup --list --noheadings --output BACK-FILE | grep -c /var/lib/roost/)"
    # A namespace that only a tap holds has no process and no name; the id that the host's namespace gave it for the veth
    # lives as long as it does.
    echo "network namespaces" "$(ip netns list-id 2>/dev/null | grep -c '^nsid')"
    echo "veths" "$(ip -brief link show type veth | grep -c '^roost-v')"
    echo "tap descriptors" "$(find /proc/[0-9]*/fd -lname '/dev/net/tun' 2>/dev/null | wc -l)"
    echo "nft rules outside the static table" "$(nft --json list ruleset | jq '[.nftables[].rule | select(. != null and .table != "roost")] | length')"
    echo "nft rules in the static table, beyond those at the start" $(($(static_rules) - STATIC_RULES))
    echo "processes of VMs" "$(ps -eo comm= | grep -cE "^(${vms})")"
    echo "sockets and run directories" "$(find /run/roost/vm -mindepth 1 | wc -l)"
    echo "cgroups of VMs" "$(find /sys/fs/cgroup -type d -path '*roost-vmmshim@*' | wc -l)"
    echo "sandbox files" "$(find /var/lib/roost/sandboxes -mindepth 1 | wc -l)"
}
static_rules() {
    nft --json list ruleset | jq '[.nftables[].rule | select(. != null and .table == "roost")] | length'
}
nothing_left() {
    awk '$NF != 0 { left = 1 } END { exit left }' <<<"$1"
}

step "no sandbox yet" roost ls
STATIC_RULES=$(static_rules)
step "create a sandbox" roost create --id demo
if [ $? -eq 0 ]; then
    step "uname in it" roost exec demo -- uname -a
    step "a small program in it" roost exec demo -- sh -c "$PROGRAM"
    step "it is listed" roost ls
    printf '\n--- what it consists of on this host\n'
    census | sed 's/^/    /'
    step "destroy it" roost rm demo
fi
step "no sandbox left" roost ls

printf '\n--- what roost left in the kernel\n'
start=$EPOCHREALTIME
# The kernel removes namespaces and devices in work queues of its own.
for _ in {1..20}; do
    left=$(census)
    nothing_left "$left" && break
    sleep 0.2
done
sed 's/^/    /' <<<"$left"
if nothing_left "$left"; then
    printf '    (all 0 after %s s)\n' "$(since "$start")"
else
    printf '    something is left\n'
    failures=$((failures + 1))
fi

printf '\n%s\n' "$([ "$failures" -eq 0 ] && echo "demo: everything worked" || echo "demo: $failures failures")"
[ "$failures" -eq 0 ]
