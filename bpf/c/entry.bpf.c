// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
/*
 * The entry to `pressure` (slot.bpf.c): attached once, to the cgroup of the master and its workers, so
 * that its cost does not grow with the number of worker slots. Sends each event of an offloaded socket to
 * its slot's program.
 */
#include <linux/bpf.h>
#include <linux/types.h>
#include <bpf/bpf_helpers.h>

#include "abi.h"
#include "kernel.h"
#include "places.h"

/*
 * What is called for: RTT samples, the options of what is sent, and those of what arrives beside the fast path
 * (tcp_validate_incoming).
 */
#define WANTED                                                                                                        \
	(BPF_SOCK_OPS_RTT_CB_FLAG | BPF_SOCK_OPS_WRITE_HDR_OPT_CB_FLAG | BPF_SOCK_OPS_PARSE_ALL_HDR_OPT_CB_FLAG)

/* Worker slot -> its `pressure` program. */
struct {
	__uint(type, BPF_MAP_TYPE_PROG_ARRAY);
	__uint(max_entries, SLOTS);
	__type(key, __u32);
	__type(value, __u32);
} slots SEC(".maps");

SEC("sockops")
int entry(struct bpf_sock_ops *ops)
{
	struct bpf_sock *sk = ops->sk;
	struct tcp_sock *self;
	struct place *place;

	switch (ops->op) {
	case BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB:
	case BPF_SOCK_OPS_ACTIVE_ESTABLISHED_CB:
		/* Setting them is an assignment: other programs may have wishes too. */
		bpf_sock_ops_cb_flags_set(ops, ops->bpf_sock_ops_cb_flags | WANTED);
		break;
	case BPF_SOCK_OPS_PARSE_HDR_OPT_CB:
		/* Of use only where what is sent may have no room for options. */
		self = sk ? bpf_skc_to_tcp_sock(sk) : 0;
		if (!self || !self->rx_opt.num_sacks)
			break;
		place = bpf_sk_storage_get(&places, sk, 0, 0);
		if (place)
			bpf_tail_call(ops, &slots, place->slot);
		break;
	case BPF_SOCK_OPS_HDR_OPT_LEN_CB:
		/* Nothing is sent, only the room for it is asked for: once for each fragment that is redirected, and more often
		 * than all the rest together. */
		if (ops->args[0] == BPF_WRITE_HDR_TCP_CURRENT_MSS)
			break;
	case BPF_SOCK_OPS_RTT_CB:
		place = sk ? bpf_sk_storage_get(&places, sk, 0, 0) : 0;
		if (place)
			bpf_tail_call(ops, &slots, place->slot);
		break;
	}
	return 1;
}

char LICENSE[] SEC("license") = "Dual BSD/GPL";
