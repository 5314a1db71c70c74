# roost on each client node of a Nomad cluster with the meta key roost = "true". NOT TESTED on one, as no cluster is part of this project's
# tests: only its syntax is. The packages, which this does no more than install, are tested.
#
# Nomad brings the packages to the node and says whether the agent serves. It is no scheduler of sandboxes: they are units of the node's systemd,
# made by whoever calls the agents, and outlive this job and each version of it. Needs the driver raw_exec, and in the
# client's configuration host_network "loopback" { cidr = "127.0.0.0/8" }, where the agent says whether it serves.
job "roost" {
  type        = "system"
  datacenters = ["*"]

  constraint {
    attribute = "${meta.roost}"
    value     = "true"
  }

  # One node after the other. An upgrade interrupts no sandbox, so nothing is drained.
  update {
    max_parallel = 1
  }

  group "host" {
    network {
      port "api" {
        static = 50051
      }
      port "status" {
        static       = 50052
        host_network = "loopback"
      }
    }

    service {
      name     = "roost-agent"
      provider = "nomad"
      port     = "status"

      check {
        type     = "http"
        path     = "/health"
        interval = "10s"
        timeout  = "2s"
      }
    }

    task "install" {
      driver = "raw_exec"
      lifecycle {
        hook = "prestart"
      }

      # Where you keep the packages.
      artifact {
        source      = "https://packages.example/roost-host_0.1.0_amd64.deb"
        destination = "local/packages"
      }
      artifact {
        source      = "https://packages.example/roost-guest-tools_0.1.0_amd64.deb"
        destination = "local/packages"
      }
      env {
        DEBIAN_FRONTEND = "noninteractive"
      }
      config {
        command = "/bin/sh"
        args    = ["-eu", "-c", "exec apt-get install --yes --no-install-recommends \"$NOMAD_TASK_DIR\"/packages/*.deb"]
      }
    }

    task "journal" {
      driver = "raw_exec"
      config {
        command = "/usr/bin/journalctl"
        args    = ["--unit", "roost-agent", "--follow", "--lines", "100"]
      }
      resources {
        cpu    = 10
        memory = 32
      }
    }
  }
}
