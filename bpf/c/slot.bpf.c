// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
/*
 * The programs of one worker slot: the verdict on every segment that arrives on an offloaded socket, and
 * the back-pressure that keeps what the kernel holds for a slow reader within bounds.
 *
 * `verdict` runs once for each skb, from tcp_read_skb, under the lock of the receiving socket. It never
 * redirects an empty skb (a bare FIN would end the other socket's egress), never forwards a byte twice,
 * and leaves to user space what it cannot forward.
 *
 * `join` puts a pair into the maps.
 *
 * `pressure` runs at the socket's own TCP events, also under its lock. A source whose target has too much
 * outstanding is taken out of `sources` there: then its bytes stay in its receive queue, charged to it,
 * its window closes, and the sender feels TCP's own back-pressure. User space puts it back.
 *
 * Both keep the sum of what all flows of the slot have outstanding: each flow remembers what it stands for
 * in that sum, and whoever sees it change takes the old value out and puts the new one in.
 */
#include <linux/bpf.h>
#include <linux/in.h>
#include <linux/types.h>
#include <bpf/bpf_helpers.h>
#include <bpf/bpf_core_read.h>

#include "abi.h"
#include "kernel.h"
#include "maps.h"

/* sk_skb_adjust_room refuses more than this at once (net/core/filter.c, 6.12). */
#define TRIM_STEP 4095
/* An overlap is smaller than the largest skb: 64 KiB, or 512 KiB with BIG TCP. */
#define TRIM_STEPS 129

/* A flow's part of the slot's sum follows it in steps of this: most segments need no atomic for it. */
#define HELD_STEP (16 * 1024)

/* However much small segments cost, so much is announced. */
#define WINDOW_FLOOR (64 * 1024)

/* include/uapi/linux/tcp.h and asm-generic/socket.h, include/net/sock.h */
#define TCP_WINDOW_CLAMP 10
#define SOL_SOCKET 1
#define SO_RCVBUF 8
#define SOCK_RCVBUF_LOCK 2

/* Puts the types into the object's BTF, which user space takes their layout from. */
const volatile struct event event_layout;
const volatile enum flow_floor flow_floor_layout;
const volatile enum segment_cost segment_cost_layout;
const volatile struct join_request join_request_layout;
const volatile enum join_answer join_answer_layout;

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

/* The first sequence number of the skb: TCP_SKB_CB(skb)->seq is the first word of its control block. */
static __always_inline __u32 segment_seq(struct __sk_buff *skb)
{
	__u32 seq = 0;

	bpf_probe_read_kernel(&seq, sizeof(seq), (void *)skb + bpf_core_field_offset(struct sk_buff, cb));
	return seq;
}

/* The socket that the segment came on. */
static __always_inline struct tcp_sock *source_of(struct __sk_buff *skb)
{
	struct bpf_sock *sk = skb->sk;

	return sk ? bpf_skc_to_tcp_sock(sk) : 0;
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

/* Whether a source's receive buffer has grown to more than twice a window, beyond Linux's own limit (net.ipv4.tcp_rmem). */
static __always_inline int has_grown(struct tcp_sock *self, struct flow *flow)
{
	return (__u32)self->inet_conn.icsk_inet.sk.sk_rcvbuf / 2 > flow->window_bytes;
}

/*
 * Announces no more than the flow's largest window. The kernel raises the limit as often as it lets the receive buffer
 * grow (tcp_rcv_space_adjust); this is called before each announcement (tcp_select_window), so none is too large. A
 * buffer of a fixed size would do as well, but small segments do not fit: where those gather or are held back in a buffer that has
 * grown, only so much is announced as costs a window, going by what waits, and an eighth of that once more waits than
 * comes in one burst, so that the buffer can be limited.
 */
static __always_inline void limit_window(struct bpf_sock_ops *ops, struct tcp_sock *self, struct flow *flow)
{
	__u32 unread = self->rcv_nxt - self->copied_seq;
	__u32 waiting = self->inet_conn.icsk_inet.sk.sk_backlog.rmem_alloc.counter;
	__u64 bytes = flow->window_bytes;
	/* What was narrowed below this is widened. */
	__u64 least = bytes;
	int window;

	if ((flow->gather || (flow->small && flow->pause == PAUSE_ON)) && has_grown(self, flow)) {
		if (!unread || !waiting || self->rx_opt.num_sacks) {
			/* Nothing waits, or behind a hole: what it costs is not known. */
			least = 0;
		} else {
			if (!flow->gather || waiting > bytes / 8 * 5)
				bytes /= 8;
			if (waiting > unread)
				bytes = bytes * unread / waiting;
			if (bytes < WINDOW_FLOOR)
				bytes = WINDOW_FLOOR;
			least = bytes / 2;
		}
	}
	if (self->window_clamp > bytes || (flow->narrowed && self->window_clamp < least)) {
		window = bytes;
		bpf_setsockopt(ops, IPPROTO_TCP, TCP_WINDOW_CLAMP, &window, sizeof(window));
		flow->narrowed = bytes < flow->window_bytes;
	}
}

/*
 * The receive queue of a source that is held back fills until its buffer is full, however large that has grown. User space
 * gives the buffer its size, but may come late: here it is limited to twice a window. What was announced has to find room,
 * or the sender waits for a timeout that doubles each time; so it is reckoned at twice what the segments that wait cost for
 * their bytes. A stream of small segments would be slower for good, so its buffer is left alone until more waits there than
 * a window.
 */
static __always_inline void limit_buffer(struct bpf_sock_ops *ops, struct tcp_sock *self, struct flow *flow)
{
	struct sock *sk = &self->inet_conn.icsk_inet.sk;
	__u32 bytes = flow->window_bytes;
	/* Below zero if the sender has gone beyond it. */
	__s32 left = (__s32)(self->rcv_wup + self->rcv_wnd - self->rcv_nxt);
	__u32 unread = self->rcv_nxt - self->copied_seq;
	__u32 waiting = sk->sk_backlog.rmem_alloc.counter;
	__u64 promised = left > 0 ? left : 0;

	if (bytes > flow->settable_bytes || !has_grown(self, flow) ||
	    BPF_CORE_READ_BITFIELD(sk, sk_userlocks) & SOCK_RCVBUF_LOCK)
		return;
	if ((flow->gather || flow->small) && waiting <= bytes)
		return;
	if (unread && waiting > unread)
		promised = promised * waiting / unread;
	if (waiting + 2 * promised <= 2 * (__u64)bytes)
		bpf_setsockopt(ops, SOL_SOCKET, SO_RCVBUF, &bytes, sizeof(bytes));
}

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
static __always_inline void hold_back(struct tcp_sock *self, struct flow *flow, __u32 index, struct slot_total *shared)
{
	struct cpu_total *total;
	__u32 cpu;

	if (flow->pause != PAUSE_WANTED || self->inet_conn.icsk_inet.sk.sk_receive_queue.qlen)
		return;
	if (__sync_val_compare_and_swap(&flow->pause, PAUSE_WANTED, PAUSE_ON) != PAUSE_WANTED)
		return;
	bpf_map_delete_elem(&sources, &index);
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
		hold_back(self, flow, index, shared);
		if (flow->pause == PAUSE_ON || flow->gather)
			limit_buffer(ops, self, flow);
	}
	if (ops->op == BPF_SOCK_OPS_PARSE_HDR_OPT_CB)
		return 1;
	index ^= 1;
	flow = bpf_map_lookup_elem(&flows, &index);
	if (flow)
		tell_drained(self, flow, index, shared);
	return 1;
}

/* The part of `union bpf_attr` that BPF_MAP_UPDATE_ELEM has. */
struct update {
	__u32 map;
	__u32 pad;
	__u64 key;
	__u64 value;
	__u64 flags;
};

static __always_inline long put(__s32 map, const void *key, const void *value)
{
	struct update update = { .map = map, .key = (unsigned long)key, .value = (unsigned long)value };

	return bpf_sys_bpf(BPF_MAP_UPDATE_ELEM, &update, sizeof(update));
}

static __always_inline long put_socket(__s32 map, __u32 index, __s32 socket)
{
	__u64 descriptor = socket;

	return put(map, &index, &descriptor);
}

static __always_inline long enter(struct join_request *request, __u32 side)
{
	__u32 index = request->index + side;
	struct flow *flow = bpf_map_lookup_elem(&flows, &index);
	struct place place = { .slot = slot_number, .index = index };
	__u64 cookie = request->cookies[side];
	__s32 socket = request->sockets[side];
	__u64 stale;
	long error;

	if (!flow)
		return -2; /* ENOENT */
	stale = flow->indexed_cookie;
	if (stale && stale != cookie)
		bpf_map_delete_elem(&indices, &stale);
	flow->indexed_cookie = cookie;
	error = bpf_map_update_elem(&indices, &cookie, &index, BPF_ANY);
	if (error)
		return error;
	return put(request->places, &socket, &place);
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
