/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * Which slot this is, and how its worker is told what happened to a flow.
 */
#ifndef CULVERT_SLOT_TELL_H
#define CULVERT_SLOT_TELL_H

#include "../abi.h"
#include "../maps.h"

/* The worker slot's number, set by user space before loading. */
const volatile __u32 slot_number;

static __always_inline struct slot_total *slot(void)
{
	__u32 number = slot_number;

	return bpf_map_lookup_elem(&slot_totals, &number);
}

/* Says 0 if it was told, or if nobody reads this lane. */
static __always_inline long say(__u32 lane, struct event *event)
{
	switch (lane) {
	case 0:
		return bpf_ringbuf_output(&lane_0, event, sizeof(*event), 0);
	case 1:
		return bpf_ringbuf_output(&lane_1, event, sizeof(*event), 0);
	case 2:
		return bpf_ringbuf_output(&lane_2, event, sizeof(*event), 0);
	case 3:
		return bpf_ringbuf_output(&lane_3, event, sizeof(*event), 0);
	default:
		return 0;
	}
}

/*
 * A worker that stands still leaves its ring full. What happened is in the flow, but nobody looks there unless told
 * to: so what could not be told is counted, and the worker compares the count whenever it has run. The second try
 * is for a worker that had emptied the ring and compared just before the loss was counted: either there is room
 * now, and that wakes it, or the ring has been filled anew, and that did.
 */
static __always_inline void tell(struct flow *flow, __u32 index, enum event_kind kind)
{
	struct event event = { .index = index, .kind = kind };
	__u32 lane = flow->lane;
	struct slot_total *shared;

	if (!say(lane, &event))
		return;
	shared = slot();
	if (!shared)
		return;
	__sync_fetch_and_add(&shared->lost_events, 1);
	event.kind = EVENT_LOST;
	say(lane, &event);
}

static __always_inline void trouble(struct flow *flow, __u32 index, enum flow_flag flag)
{
	flow->flags |= flag;
	tell(flow, index, EVENT_TROUBLE);
}

#endif
