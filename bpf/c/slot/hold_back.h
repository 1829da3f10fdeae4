/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * Holding a source back, and saying when it may be let go.
 */
#ifndef CULVERT_SLOT_HOLD_BACK_H
#define CULVERT_SLOT_HOLD_BACK_H

#include "../kernel.h"
#include "../maps.h"
#include "buffers.h"
#include "outstanding.h"
#include "tell.h"

/*
 * The socket is about to send a segment, most likely the ACK of what was just taken from it. If it is to
 * be held back, this is the moment: its lock is held (bpf_skops_hdr_opt_len), so no verdict on it runs
 * elsewhere; and where this call is nested in tcp_read_skb (tcp_eat_skb -> tcp_cleanup_rbuf -> ACK) the
 * verdict on the present skb is made, and with an empty receive queue there is no next one that could
 * find its program gone and be dropped.
 *
 * An ACK with timestamps and three SACK blocks has no room for an option, and nobody is asked for one: a sender that
 * leaves three holes open would never be held back. So a segment that arrives while there are any is such a moment
 * too: bpf_skops_parse_hdr has the lock as well, and its data is not queued yet. Holes keep the receiver off the
 * fast path (tcp_fast_path_check), where options are not looked at.
 */
static __always_inline void hold_back(struct bpf_sock_ops *ops, struct tcp_sock *self, struct flow *flow, __u32 index,
				      struct slot_total *shared)
{
	struct cpu_total *total;
	__u32 cpu;

	if (flow->pause != PAUSE_WANTED || self->inet_conn.icsk_inet.sk.sk_receive_queue.qlen)
		return;
	if (__sync_val_compare_and_swap(&flow->pause, PAUSE_WANTED, PAUSE_ON) != PAUSE_WANTED)
		return;
	bpf_map_delete_elem(&sources, &index);
	make_room(ops, self, flow);
	if (!flow->gather) {
		flow->pauses++;
		__sync_fetch_and_add(&shared->pauses, 1);
		cpu = bpf_get_smp_processor_id();
		total = bpf_map_lookup_elem(&totals, &cpu);
		if (total)
			__sync_fetch_and_add(&total->pauses, 1);
	}
	tell(flow, index, EVENT_PAUSED);
}

/*
 * The socket is the target of the flow at `other`: says when its source may be let go. Few enough bytes of the
 * flow have to be outstanding; and of the slot, unless the flow has next to none.
 */
static __always_inline void tell_drained(struct tcp_sock *self, struct flow *flow, __u32 other, struct slot_total *shared)
{
	__s32 outstanding;

	if (!(flow->flags & FLOW_STARTED))
		return;
	outstanding = outstanding_bytes(flow, self);
	if (flow->queued)
		outstanding = charge(flow, self, outstanding);
	count_held(flow, other, outstanding, shared);
	if (!flow->wake || outstanding >= (__s32)flow->low_bytes)
		return;
	if (outstanding >= FLOW_FLOOR && !has_room(shared)) {
		shared->wake = 1;
		return;
	}
	if (__sync_lock_test_and_set(&flow->wake, 0))
		tell(flow, other, EVENT_DRAINED);
}

#endif
