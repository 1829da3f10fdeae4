// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
/*
 * The programs of one worker slot: the verdict on every segment that arrives on an offloaded socket, and
 * the back-pressure that keeps what the kernel holds for a slow reader within bounds.
 *
 * `verdict` runs once for each skb, from tcp_read_skb, under the lock of the receiving socket. It never
 * redirects an empty skb (a bare FIN would end the other socket's egress), never forwards a byte twice,
 * and leaves to user space what it cannot forward.
 *
 * `pressure` runs at the socket's own TCP events, also under its lock. A source whose target has too much
 * outstanding is taken out of `sources` there: then its bytes stay in its receive queue, charged to it,
 * its window closes, and the sender feels TCP's own back-pressure. User space puts it back.
 *
 * `join` puts a pair into the maps.
 *
 * What they do is in slot/: forward.h (a segment's way), outstanding.h (what is on its way, and the slot's sum of it),
 * hold_back.h (the pause and the word that it may end), buffers.h (window and buffer of a source), join.h, and tell.h
 * (the worker's ring buffer).
 */
#include <linux/bpf.h>
#include <linux/in.h>
#include <linux/types.h>
#include <bpf/bpf_helpers.h>
#include <bpf/bpf_core_read.h>

#include "abi.h"
#include "kernel.h"
#include "maps.h"
#include "slot/buffers.h"
#include "slot/forward.h"
#include "slot/hold_back.h"
#include "slot/join.h"

/* Puts the types into the object's BTF, which user space takes their layout from. */
const volatile struct event event_layout;
const volatile enum flow_floor flow_floor_layout;
const volatile enum segment_cost segment_cost_layout;
const volatile struct join_request join_request_layout;
const volatile enum join_answer join_answer_layout;

SEC("sk_skb/stream_verdict")
int verdict(struct __sk_buff *skb)
{
	__u64 cookie = bpf_get_socket_cookie(skb);
	__u32 *found = bpf_map_lookup_elem(&indices, &cookie);
	struct tcp_sock *target;
	struct bpf_sock *peer;
	struct flow *flow;
	__u32 index, other;
	int answer = SK_PASS;

	if (!found)
		return SK_PASS;
	index = *found;
	other = index ^ 1;
	flow = bpf_map_lookup_elem(&flows, &index);
	if (!flow || flow->cookie != cookie)
		return SK_PASS;
	if (!skb->len)
		return SK_DROP;

	peer = bpf_map_lookup_elem(&targets, &other);
	if (!peer) {
		trouble(flow, index, FLOW_NO_TARGET);
		return SK_PASS;
	}
	target = bpf_skc_to_tcp_sock(peer);
	if (target)
		answer = forward(skb, flow, index, target);
	bpf_sk_release(peer);
	return answer;
}

SEC("sockops")
int pressure(struct bpf_sock_ops *ops)
{
	struct slot_total *shared = slot();
	struct bpf_sock *sk = ops->sk;
	struct tcp_sock *self;
	struct place *place;
	struct flow *flow;
	__u32 index;

	if (!sk || !shared)
		return 1;
	place = bpf_sk_storage_get(&places, sk, 0, 0);
	self = bpf_skc_to_tcp_sock(sk);
	if (!place || !self)
		return 1;
	index = place->index;
	flow = bpf_map_lookup_elem(&flows, &index);
	if (!flow || flow->cookie != bpf_get_socket_cookie(ops))
		return 1;
	if (ops->op == BPF_SOCK_OPS_HDR_OPT_LEN_CB)
		limit_window(ops, self, flow);
	if (ops->op != BPF_SOCK_OPS_RTT_CB) {
		hold_back(ops, self, flow, index, shared);
		if (flow->pause == PAUSE_ON || flow->gather)
			limit_buffer(ops, self, flow);
	}
	if (ops->op == BPF_SOCK_OPS_PARSE_HDR_OPT_CB)
		return 1;
	index ^= 1;
	flow = bpf_map_lookup_elem(&flows, &index);
	if (flow) {
		widen_target(ops, self, flow, index);
		tell_drained(self, flow, index, shared);
	}
	return 1;
}

/*
 * Hands both sockets of a pair to the kernel: run by the worker (BPF_PROG_TEST_RUN), one system call for what
 * would be eight. The order matters: both sockets are targets before one becomes a source, so no byte can find its
 * target missing.
 */
SEC("syscall")
int join(struct join_request *request)
{
	__u32 index = request->index;
	long error;

	error = enter(request, 0);
	if (!error)
		error = enter(request, 1);
	if (!error)
		error = put_socket(request->targets, index, request->sockets[0]);
	if (!error)
		error = put_socket(request->targets, index + 1, request->sockets[1]);
	if (!error && request->wanted & 1)
		error = put_socket(request->sources, index, request->sockets[0]);
	if (error)
		return error;
	if (request->wanted & 2)
		error = put_socket(request->sources, index + 1, request->sockets[1]);
	/* Not an error if the other socket is a source by now: bytes may be on their way. */
	if (error && request->wanted & 1)
		return JOIN_TO_UPSTREAM_ONLY;
	return error;
}

char LICENSE[] SEC("license") = "Dual BSD/GPL";
