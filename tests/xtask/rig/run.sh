#!/bin/bash
# In the rig, as root: bring the daemons up as asked, run the command, report its status.
#
# Three virtio-serial ports lead to the xtask outside:
#   rig.out  the command's output    rig.ctl  our progress, a line each    rig.log  journal, kept as a file
# /rig holds, from this run: settings (shell variables), command (argv, quoted), prepare.sh.
set -u
. /rig/settings

for port in /sys/class/virtio-ports/*; do
    case $(<"$port/name") in
        rig.out) out=/dev/${port##*/} ;;
        rig.ctl) ctl=/dev/${port##*/} ;;
        rig.log) log=/dev/${port##*/} ;;
    esac
done
exec {ctl_fd}>"$ctl"
say() { echo "$*" >&"$ctl_fd"; }

# All that helps to understand a failure, into the file outside.
keep_journal() {
    {
        echo "--- processes"
        ps -eo pid,ppid,user:20,stat,etimes,args --forest
        echo "--- failed units"
        systemctl --no-pager --failed
        echo "--- journal"
        journalctl -b --no-pager -o short-monotonic
    } >"$log" 2>&1
}
failed() {
    keep_journal
    say "failed $*"
    exit 1
}
trap 'say "failed the rig stopped"' TERM

say "up"
# Ahead of everything else, and on each processor: the xtask takes a rig that says nothing for one whose kernel hangs.
chrt -f -p 1 $BASHPID
(while sleep 5; do
    for ((cpu = 0; cpu < $(nproc); cpu++)); do taskset -c "$cpu" true || continue 2; done
    say "alive"
done) &
chrt -o -p 0 $BASHPID
# TCG emulates AMD's SVM; with real nested KVM either may be there.
modprobe kvm-amd 2>/dev/null || modprobe kvm-intel 2>/dev/null || say "note no nested KVM in the rig"
udevadm settle -t 5

if [ "$RIG_MODE" != bare ]; then
    . /rig/prepare.sh
fi

# A watchdog inside, ahead of the one outside, so that a hanging command leaves a journal behind.
(
    read -r uptime _ </proc/uptime
    left=$((RIG_TIMEOUT - ${uptime%.*}))
    # The one outside counts from before there was an uptime.
    sleep $((left > 60 ? left - 30 : left))
    keep_journal
    say "timeout"
) &
watchdog=$!

# In a series of boots the command may end one: it writes a line here. Told `cut`, the xtask kills QEMU; told `off`, it waits for its end.
if [ "$RIG_SERIES" = 1 ]; then
    mkfifo -m 0600 /run/rig-cut
    (read -r how moment </run/rig-cut && say "$how $moment" && if [ "$how" = off ]; then systemctl poweroff; fi) &
fi

# Through a pipe: the port itself can be opened only once, and commands re-open /dev/stderr.
exec {sink}> >(exec cat >"$out")
cat_pid=$!
eval "command=($(</rig/command))"
say "run"
(
    exec {ctl_fd}>&- >&"$sink" 2>&1 {sink}>&-
    exec env -u RIG_MODE -u RIG_TIMEOUT ${RIG_ENV[@]+"${RIG_ENV[@]}"} "${command[@]}"
)
status=$?
exec {sink}>&-
kill "$watchdog" 2>/dev/null
if [ "$status" -ne 0 ]; then
    keep_journal
fi
# The pipe's reader ends when the last writer does; a process left behind must not hold us.
for _ in {1..40}; do
    kill -0 "$cat_pid" 2>/dev/null || break
    sleep 0.05
done
say "exit $status"
