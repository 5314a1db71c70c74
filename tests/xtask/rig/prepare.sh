# Sourced by run.sh in the rig: what is left to do for an administrator after the package is there, then the daemons.
# systemd has made users and directories and set sysctls at boot, from packaging/.
step() { say "step $1"; }
daemons_failed() {
    systemctl --no-pager status 'roost-*' || true
    failed "$1"
}

# A fault that a test had set when the power was cut is not meant for this boot.
rm -f /var/lib/roost/failpoint{,.reached,.go,.lose}
chown -R roost:roost-vm /var/lib/roost/kernels /var/lib/roost/images

# What an idle guest's timers cost on emulated processors is work on real ones.
{ echo 'busy_cpu_percent = 70'; echo 'boot_timeout_sec = 400'; } >>/etc/roost/agent.toml
# Tests count what there is of sandboxes; those of what is made ahead switch it on.
echo 'ready_sandboxes = 0' >>/etc/roost/agent.toml

step "making certificates"
roost pki init --dir /etc/roost/pki || failed "roost pki init: status $?"
# The agent reads its own key; the CA's and the client's stay with root.
chown root:roost /etc/roost/pki /etc/roost/pki/{ca,server,server-key}.pem
chmod 0640 /etc/roost/pki/{ca,server,server-key}.pem

start_units() {
    step "starting the units"
    systemctl start roost-privd.socket roost-vmmshim.socket || failed "the sockets do not start"
    # The first call would start it. Started here, what it makes once (its nftables table) is there before anyone counts.
    systemctl start roost-privd.service || failed "privd does not start"
    systemctl start roost-agent.service || failed "the agent does not start"
}

start_direct() {
    step "starting the daemons by hand"
    local groups arg toml=()
    mkdir -p /run/rig
    . /etc/roost/vmmshim.env
    for arg in $ROOST_SHIM_ARGS; do
        toml+=("\"$arg\"")
    done
    { echo 'shim = "child"'; (IFS=,; echo "shim_args = [${toml[*]}]"); } >>/etc/roost/agent.toml
    setsid roost-privd --socket /run/roost/privd.sock --peer-user roost >/run/rig/privd.log 2>&1 </dev/null &
    # The VMs share the agent's uid here, so it needs their groups.
    setsid setpriv --reuid=roost --regid=roost --groups=roost,roost-vm,kvm --inh-caps=-all --bounding-set=-all --no-new-privs \
        roost-agent >/run/rig/agent.log 2>&1 </dev/null &
    local agent=$!
    for _ in {1..300}; do
        (exec 3<>/dev/tcp/127.0.0.1/50051) 2>/dev/null && return
        kill -0 "$agent" 2>/dev/null || failed "the agent ended: $(tail -n 3 /run/rig/agent.log)"
        sleep 0.1
    done
    failed "the agent does not listen"
}

case $RIG_MODE in
    systemd) start_units ;;
    direct) start_direct ;;
esac
