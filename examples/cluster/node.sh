#!/usr/bin/env bash
# Starts Ray on this machine, in the foreground, as one node of a cluster that `videoseg submit` can use (docs/cluster.md).
#
#   node.sh head ADDRESS [options]           ADDRESS: this machine's, in the cluster's private network
#   node.sh worker HEAD ADDRESS [options]    HEAD: the head node's address; waits until it answers
#
# Options go to `ray start`, for example --num-gpus=8 --object-store-memory=20000000000. The token (RAY_AUTH_TOKEN, or the file
# ~/.ray/auth_token) is the same on all nodes.
set -euo pipefail
if [ -z "${RAY_AUTH_TOKEN:-}${RAY_AUTH_TOKEN_PATH:-}" ] && [ ! -s ~/.ray/auth_token ]; then
    echo "no token: run \`ray get-auth-token --generate\` once and copy ~/.ray/auth_token to every node, or export RAY_AUTH_TOKEN" >&2
    exit 2
fi
export RAY_AUTH_MODE=token
venv=$(cd "$(dirname "$0")/../.." && pwd)/.venv/bin
[ ! -d "$venv" ] || export PATH=$venv:$PATH # jobs find `videoseg` by it

# Fixed ports: for a firewall's rules, and because Ray gives its agents 15 seconds to name the ports that they chose, too few on a slow disk.
common=(--block --disable-usage-stats --node-manager-port=52360 --object-manager-port=52361 --dashboard-agent-grpc-port=52362
    --runtime-env-agent-port=52363 --metrics-export-port=52364 --dashboard-agent-listen-port=52365)
case ${1:-} in
    head)
        address=${2:?the address of this machine is missing}
        # The dashboard, which takes jobs, on the loopback alone: reach it through ssh -L 8265:127.0.0.1:8265 HEAD
        exec ray start --head --node-ip-address="$address" --port=6379 --dashboard-host=127.0.0.1 --dashboard-port=8265 "${common[@]}" "${@:3}"
        ;;
    worker)
        head=${2:?the address of the head node is missing} address=${3:?the address of this machine is missing}
        until (: <>"/dev/tcp/$head/6379") 2>/dev/null; do sleep 2; done
        exec ray start --address="$head:6379" --node-ip-address="$address" "${common[@]}" "${@:4}"
        ;;
    *)
        sed -n '2,/^set/{/^set/!s/^# \{0,1\}//p}' "$0" >&2
        exit 2
        ;;
esac
