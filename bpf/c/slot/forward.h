/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * A segment's way: what of it continues the stream goes to the target, and then it is decided whether the source has to be
 * held back.
 */
#ifndef CULVERT_SLOT_FORWARD_H
#define CULVERT_SLOT_FORWARD_H

#include "../kernel.h"
#include "../maps.h"
#include "outstanding.h"
#include "tell.h"

/* sk_skb_adjust_room refuses more than this at once (net/core/filter.c, 6.12). */
#define TRIM_STEP 4095
/* An overlap is smaller than the largest skb: 64 KiB, or 512 KiB with BIG TCP. */
#define TRIM_STEPS 129

/* The socket that the segment came on. */
static __always_inline struct tcp_sock *source_of(struct __sk_buff *skb)
{
	struct bpf_sock *sk = skb->sk;

	return sk ? bpf_skc_to_tcp_sock(sk) : 0;
}

/* The first sequence number of the skb: TCP_SKB_CB(skb)->seq is the first word of its control block. */
static __always_inline __u32 segment_seq(struct __sk_buff *skb)
{
	__u32 seq = 0;

	bpf_probe_read_kernel(&seq, sizeof(seq), (void *)skb + bpf_core_field_offset(struct sk_buff, cb));
	return seq;
}

/*
 * Where the stream stands when the first segment is seen: everything before copied_seq was read by user
 * space. A segment that it read in part is trimmed like any overlap.
 */
static __always_inline int start(struct __sk_buff *skb, struct flow *flow)
{
	struct tcp_sock *source = source_of(skb);

	if (!source)
		return -1;
	flow->next_seq = source->copied_seq;
	flow->flags |= FLOW_STARTED;
	return 0;
}

/* What is left to cut off an skb. */
struct cut {
	struct __sk_buff *skb;
	__u32 left;
};

static long trim_step(__u32 round, void *context)
{
	struct cut *cut = context;
	__u32 step = cut->left < TRIM_STEP ? cut->left : TRIM_STEP;

	if (!step || bpf_skb_adjust_room(cut->skb, -(__s32)step, 0, 0))
		return 1;
	cut->left -= step;
	return 0;
}

/*
 * Cuts off what was forwarded before: tcp_data_queue may queue a segment that begins before rcv_nxt,
 * and tcp_read_skb hands it over whole. bpf_loop (Linux 5.17), because the verifier would walk a loop in
 * the program round by round, which takes a quarter of a second for each worker slot.
 */
static __always_inline int trim(struct __sk_buff *skb, __u32 overlap)
{
	struct cut cut = { .skb = skb, .left = overlap };

	if (bpf_loop(TRIM_STEPS, trim_step, &cut, 0) < 0)
		return -1;
	return cut.left ? -1 : 0;
}

/*
 * Whether small segments come faster than is good for the kernel thread: each costs a wake-up and a tcp_sendmsg. User space
 * reads many at once. A reader that is slow is no reason: what its socket has no space for waits, whoever copies it.
 */
static __always_inline int is_to_gather(struct flow *flow, struct cpu_total *total, struct tcp_sock *target, __u32 len,
					__s32 outstanding)
{
	struct sock *sk = &target->inet_conn.icsk_inet.sk;
	int is_fast;
	__u32 tick;

	/* Bulk ends each of its writes in a small one. */
	if (len >= SMALL_SEGMENT) {
		if (flow->small)
			flow->small = 0;
		if (flow->crowded_ticks)
			flow->crowded_ticks--;
		return 0;
	}
	if (!flow->small)
		flow->small = 1;
	/* A question, or an answer: there is nothing to be put together with it. */
	if (outstanding <= (__s32)len && flow->queued < CROWD_WAITING)
		return 0;
	tick = bpf_ktime_get_ns() >> 20;
	if (total->tick != tick) {
		total->tick = tick;
		total->tick_segments = 0;
	}
	total->tick_segments++;
	if (flow->tick != tick) {
		flow->tick = tick;
		flow->tick_segments = 0;
	}
	flow->tick_segments++;
	if (flow->tick_segments & TICK_CROWDED)
		return 0;
	is_fast = total->tick_segments >= CROWD_SEGMENTS && flow->tick_segments >= CROWD_OWN;
	if ((!is_fast && flow->queued < CROWD_WAITING) || sk->sk_wmem_queued >= sk->sk_sndbuf >> 1)
		return 0;
	flow->tick_segments |= TICK_CROWDED;
	if (tick - flow->period_start > CROWD_PERIOD) {
		flow->period_start = tick;
		flow->crowded_ticks = 0;
	}
	flow->crowded_ticks++;
	return flow->crowded_ticks >= CROWD_TICKS;
}

/*
 * Whether the source's socket backlog is about to close its window for good. While the worker that kicks it holds its lock, what
 * arrives waits in that backlog, and is forwarded when the lock is released. Over loopback the answer to each of our ACKs
 * is there at once, so it goes on and on. All that has passed through the backlog counts until the release is over
 * (__release_sock) and is taken off the window that is announced (tcp_space, __tcp_select_window); and then there is no reader
 * who would open it: the sender goes on when it probes, 200 ms later. So there is a pause before that: the rest waits
 * in the receive queue, and the window is opened when it is taken. The kernel thread that sends to the source holds its lock
 * too, but not for so long.
 */
static __always_inline int is_flooded(struct __sk_buff *skb)
{
	struct tcp_sock *source = source_of(skb);

	if (!source)
		return 0;
	return source->inet_conn.icsk_inet.sk.sk_backlog.len > source->inet_conn.icsk_inet.sk.sk_rcvbuf >> 2;
}

static __always_inline int forward(struct __sk_buff *skb, struct flow *flow, __u32 index, struct tcp_sock *target)
{
	struct slot_total *shared = slot();
	struct cpu_total *total;
	__u32 cpu, len;
	__s32 outstanding, behind;

	if (!(flow->flags & FLOW_STARTED) && start(skb, flow))
		return SK_PASS;

	behind = (__s32)(flow->next_seq - segment_seq(skb));
	if (behind < 0) {
		trouble(flow, index, FLOW_GAP);
		return SK_PASS;
	}
	if (behind) {
		__u32 cut = (__u32)behind < skb->len ? (__u32)behind : skb->len;

		if (trim(skb, cut)) {
			trouble(flow, index, FLOW_TRIM_FAILED);
			return SK_PASS;
		}
		flow->trimmed_bytes += cut;
		if (!skb->len)
			return SK_DROP;
	}

	if (bpf_sk_redirect_map(skb, &targets, index ^ 1, 0) != SK_PASS) {
		trouble(flow, index, FLOW_NO_TARGET);
		return SK_PASS;
	}
	len = skb->len;
	flow->next_seq += len;
	flow->forwarded_bytes += len;
	flow->last_active_ns = bpf_ktime_get_coarse_ns();

	cpu = bpf_get_smp_processor_id();
	total = bpf_map_lookup_elem(&totals, &cpu);
	if (total)
		__sync_fetch_and_add(&total->forwarded_bytes[index & 1], len);

	outstanding = behind = outstanding_bytes(flow, target);
	if (behind > (__s32)flow->largest_outstanding_bytes)
		flow->largest_outstanding_bytes = behind;
	if (!shared)
		return SK_PASS;
	if (len < SMALL_SEGMENT)
		behind = charge(flow, target, behind);
	count_held(flow, index, behind, shared);
	if (flow->pause != PAUSE_OFF) {
		/*
		 * What it may still send until it hears from us is one receive window. Far more says that `hold_back` is not
		 * called for it: another program has taken its callback flags away, or the kernel has a way of answering that
		 * we do not know.
		 */
		if (flow->runaway_bytes && behind > (__s32)flow->runaway_bytes && !(flow->flags & FLOW_RUNAWAY))
			trouble(flow, index, FLOW_RUNAWAY);
		return SK_PASS;
	}
	if (behind > (__s32)flow->high_bytes || (behind > FLOW_FLOOR && is_full(shared)) ||
	    (flow->flags & FLOW_KICKED && is_flooded(skb))) {
		flow->wake = 1;
		flow->pause = PAUSE_WANTED;
	} else if (total && is_to_gather(flow, total, target, len, outstanding)) {
		flow->gather = 1;
		flow->pause = PAUSE_WANTED;
	}
	return SK_PASS;
}

#endif
