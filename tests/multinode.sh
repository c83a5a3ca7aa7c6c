#!/bin/bash
# Rehearse training on two nodes: two network namespaces joined by a virtual cable, a rank in each,
# and the same run as two ranks of one host to compare with. Needs root and iproute2 (`ip`). As on a
# cluster, both see one file system.
#
#     tests/multinode.sh        # further options go to 03_train.py, for example --shard_size 1
set -euo pipefail
cd "$(dirname "$0")/.."
scratch=$(mktemp -d)
export OMP_NUM_THREADS=1

node0=basereward0 node1=basereward1
cleanup() {
    jobs -p | xargs -r kill 2>/dev/null || true
    ip netns delete $node0 2>/dev/null || true  # the cable goes with them
    ip netns delete $node1 2>/dev/null || true
    rm -rf "$scratch"
}
trap cleanup EXIT

torchrun="python -m torch.distributed.run"
$torchrun --standalone 01_data.py --out "$scratch/data" --world_size 0.05
$torchrun --standalone 02_model.py --out "$scratch/model" --data "$scratch/data/train"
train="03_train.py --model $scratch/model --data $scratch/data/train $*"
train="$train --steps 6 --batch_size 12 --checkpoint_every 3"

echo "one host, two ranks"
$torchrun --standalone --nproc_per_node 2 $train --out "$scratch/one_host"

echo "two hosts of one rank each"
ip netns add $node0
ip netns add $node1
ip link add cable netns $node0 type veth peer name cable netns $node1
ip -n $node0 address add 10.77.0.1/24 dev cable
ip -n $node1 address add 10.77.0.2/24 dev cable
for node in $node0 $node1; do
    ip -n $node link set lo up
    ip -n $node link set cable up
done
# Gloo (for NCCL: NCCL_SOCKET_IFNAME) would else take the host name's interface, often loopback.
export GLOO_SOCKET_IFNAME=cable
for rank in 1 0; do
    node=node$rank
    ip netns exec ${!node} $torchrun --nnodes 2 --node_rank $rank --nproc_per_node 1 \
        --master_addr 10.77.0.1 --master_port 29500 $train --out "$scratch/two_hosts" &
done
wait %1
wait %2

python - "$scratch" <<'EOF'
import sys
from safetensors.torch import load_file
for name in ("model.safetensors", "reward_head.safetensors"):
    one, two = (load_file(f"{sys.argv[1]}/{hosts}/{name}") for hosts in ("one_host", "two_hosts"))
    assert one.keys() == two.keys()
    difference = max((one[key] - two[key]).abs().max().item() for key in one)
    print(f"{name}: largest difference between one host and two {difference:.1e}")
    assert difference <= 1e-6
EOF
