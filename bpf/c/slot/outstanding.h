/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * What a flow has outstanding, what that costs the kernel, and the slot's sum of it.
 *
 * Each flow remembers what it stands for in the sum; whoever sees it change takes the old value out and puts the new one in.
 */
#ifndef CULVERT_SLOT_OUTSTANDING_H
#define CULVERT_SLOT_OUTSTANDING_H

#include "../kernel.h"
#include "../maps.h"
#include "tell.h"

/* A flow's part of the slot's sum follows it in steps of this: most segments need no atomic for it. */
#define HELD_STEP (16 * 1024)

/*
 * Bytes that the target's peer has not acknowledged: those that were redirected, and what is left of those that
 * user space sent before. One field of the target is read, so there is nothing to tear.
 */
static __always_inline __s32 outstanding_bytes(struct flow *flow, struct tcp_sock *target)
{
	return (__s32)((__u32)flow->forwarded_bytes - ((__u32)target->bytes_acked - flow->acked_base));
}

/* Of sk_user_data (include/linux/sock.h, since 5.19): what kind of pointer it is. */
#define USER_DATA_PSOCK 4UL
#define USER_DATA_FLAGS 7UL

/* Segments that wait to be taken by the target's TCP (sk_psock_backlog). */
static __always_inline __u32 queued_segments(struct tcp_sock *target)
{
	unsigned long data = (unsigned long)target->inet_conn.icsk_inet.sk.sk_user_data;
	__u32 queued = 0;

	if (data & USER_DATA_PSOCK)
		bpf_probe_read_kernel(&queued, sizeof(queued),
				      (void *)(data & ~USER_DATA_FLAGS) +
					      bpf_core_field_offset(struct sk_psock, ingress_skb.qlen));
	return queued;
}

/*
 * What a flow costs the kernel: its outstanding bytes, and what comes with each segment that is not taken yet. Without
 * the latter a sender of single bytes would take a thousand times what it may (seen: 3 GiB). The queue is another CPU's
 * most of the time, and is looked at only where segments are small.
 */
static __always_inline __s32 charge(struct flow *flow, struct tcp_sock *target, __s32 outstanding)
{
	__u32 queued = queued_segments(target);
	__s64 sum = outstanding + (__s64)queued * SEGMENT_COST;

	if (queued != flow->queued)
		flow->queued = queued;
	return sum < __INT_MAX__ ? (__s32)sum : __INT_MAX__;
}

/*
 * Brings the flow's part of the slot's sum up to date. The exchange makes sure that what was put into the sum
 * is taken out once, whoever else does the same on another CPU. What a target has in its last flight is acknowledged unseen,
 * so its worker is told to count anew (`SlotMaps::recount`).
 */
static __always_inline void count_held(struct flow *flow, __u32 index, __s32 outstanding, struct slot_total *total)
{
	__u32 held = outstanding > FLOW_FLOOR ? outstanding : 0;
	__s32 change = (__s32)(held - flow->held_bytes);
	__u64 before;
	__s64 difference;

	if (!change || (held && flow->held_bytes && change < HELD_STEP && change > -HELD_STEP))
		return;
	difference = (__s64)held - (__s64)__sync_lock_test_and_set(&flow->held_bytes, held);
	before = __sync_fetch_and_add(&total->held_bytes, difference);
	if (total->wake && before + difference < total->low_bytes && __sync_lock_test_and_set(&total->wake, 0))
		tell(flow, index, EVENT_ROOM);
	if (difference > 0 && !total->counted && !__sync_lock_test_and_set(&total->counted, 1))
		tell(flow, index, EVENT_HELD);
}

/* Whether the slot has more outstanding than it may: flows above the floor have to wait. */
static __always_inline int is_full(struct slot_total *total)
{
	return total->limit_bytes && total->held_bytes > total->limit_bytes;
}

/* Whether the slot has so little outstanding that flows may be let go. */
static __always_inline int has_room(struct slot_total *total)
{
	return !total->limit_bytes || total->held_bytes < total->low_bytes;
}

#endif
