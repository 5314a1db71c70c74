#!/bin/bash
# The demo's part inside the rig: one sandbox from create over pause, resume and a template to destroy, then what roost left in the kernel.
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

# Counts in memory, in the background, until nobody listens any more.
COUNTER='
mkdir -p /dev/shm
setsid sh -c "i=0; while sleep 0.1; do i=\$((i + 1)); echo \$i > /dev/shm/count; done" >/dev/null 2>&1 &
until [ -s /dev/shm/count ]; do sleep 0.1; done
echo "a program counts in memory: $(cat /dev/shm/count)"
'
# What a paused sandbox is.
on_disk() {
    ps -eo comm= | grep -cE 'roost-vmmshim|standin-vmm|cloud-hypervis' | sed 's/^/processes of VMs: /'
    du -sh /var/lib/roost/sandboxes/demo/vm /var/lib/roost/sandboxes/demo/rootfs.cow
}

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

# One row of the census: how many lines of a command's output match. A command that fails has counted nothing, and says so.
row() {
    local name=$1 pattern=$2 try lines number
    shift 2
    # What vanishes under find's eyes makes it fail; three times in a row it does not.
    for try in 1 2 3; do
        if lines=$("$@"); then
            number=$(grep -cE -- "$pattern" <<<"$lines")
            [ $? -le 1 ] || break
            echo "$name $number"
            return
        fi
    done
    echo "demo: cannot count $name: '$*' failed" >&2
    return 1
}
# Counts of all that a sandbox consists of, one "name number" a line.
census() {
    local vms="roost-vmmshim|standin-vmm|cloud-hypervis|qemu-system-x86" static
    row "dm devices" '^roost-' dmsetup ls &&
        row "loops" /var/lib/roost/ losetup --list --noheadings --output BACK-FILE &&
        # A namespace that only a tap holds has no process and no name; the id that the host's namespace gave it for the veth
        # lives as long as it does.
        row "network namespaces" '^nsid' ip netns list-id &&
        row "veths" '^roost-v' ip -brief link show type veth &&
        row "tap descriptors" . find /proc -ignore_readdir_race -maxdepth 3 -path '/proc/[0-9]*/fd/*' -lname /dev/net/tun &&
        row "nft rules outside the static table" . rules '!=' &&
        static=$(row "static" . rules '==') &&
        echo "nft rules in the static table, beyond those at the start $((${static##* } - STATIC_RULES))" &&
        row "processes of VMs" "^(${vms})" ps -eo comm= &&
        row "sockets and run directories" . find /run/roost/vm -ignore_readdir_race -mindepth 1 &&
        row "cgroups of VMs" . find /sys/fs/cgroup -ignore_readdir_race -type d -path '*roost-vmmshim@*' &&
        row "sandbox files" . find /var/lib/roost/sandboxes -ignore_readdir_race -mindepth 1 &&
        row "templates" . templates
}
# Rules whose table is, or is not, the static one.
rules() {
    nft --json list ruleset | jq --compact-output ".nftables[].rule | select(. != null and .table $1 \"roost\")"
}
templates() {
    [ ! -d /var/lib/roost/images/teams ] || find /var/lib/roost/images/teams -ignore_readdir_race -mindepth 2 -maxdepth 2
}
nothing_left() {
    awk '$NF != 0 { left = 1 } END { exit left }' <<<"$1"
}
# The rows of a census that see nothing although there is a sandbox. Rules for sandboxes are in their own namespaces, and
# without systemd VMs have no cgroups of their own.
blind_rows() {
    local none='^nft rules|^templates'
    systemctl --quiet is-active roost-vmmshim.socket || none+='|^cgroups of VMs'
    awk -v none="$none" '$0 !~ none && $NF == 0' <<<"$1"
}
give_up() {
    printf '\ndemo: %s\n' "$1"
    exit 1
}

readonly TEAM=11111111-2222-3333-4444-555555555555 TEMPLATE=00000000-0000-0000-0000-000000000001

STATIC_RULES=0
before=$(census) || give_up "the census does not work here"
STATIC_RULES=$(awk '/^nft rules in the static table/ { print $NF }' <<<"$before")
[ "$STATIC_RULES" -gt 0 ] || give_up "privd's static table is not there"

step "no sandbox yet" roost ls
step "create a sandbox" roost create --id demo
if [ $? -eq 0 ]; then
    step "uname in it" roost exec demo -- uname -a
    step "a small program in it" roost exec demo -- sh -c "$PROGRAM"
    step "it is listed" roost ls
    printf '\n--- what it consists of on this host\n'
    there=$(census) || give_up "the census failed"
    sed 's/^/    /' <<<"$there"
    blind=$(blind_rows "$there")
    if [ -n "$blind" ]; then
        printf '    these see nothing, so their zeros below would prove nothing:\n%s\n' "$blind"
        failures=$((failures + 1))
    fi
    step "leave something running" roost exec demo -- sh -c "$COUNTER"
    step "pause it" roost pause demo
    step "it is listed as paused" roost ls
    step "what it consists of now: memory and disk" on_disk
    step "resume it" roost resume demo
    step "it went on" roost exec demo -- sh -c 'sleep 0.5; echo "it counts still: $(cat /dev/shm/count)"'
    step "make a template of its memory and disk, while it runs" roost snapshot demo --team "$TEAM" --template "$TEMPLATE"
    step "destroy it" roost rm demo
    if step "create a sandbox from the template" roost create --id clone --team "$TEAM" --template "$TEMPLATE"; then
        step "it went on where the other one was" roost exec clone -- sh -c 'sleep 0.5; echo "it counts still: $(cat /dev/shm/count)"'
        step "destroy it too" roost rm clone
    fi
    step "delete the template" roost rmi --team "$TEAM" --template "$TEMPLATE"
fi
step "no sandbox left" roost ls

printf '\n--- what roost left in the kernel\n'
start=$EPOCHREALTIME
# The kernel removes namespaces and devices in work queues of its own.
for _ in {1..20}; do
    left=$(census) || give_up "the census failed"
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
