# Sourced by run.sh in the rig: what a package's installation does on a host, then the three daemons.
step() { say "step $1"; }
