/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * The window that a source announces, the size of its receive buffer when it is held back, and while it is, and the send buffer
 * of a target.
 */
#ifndef CULVERT_SLOT_BUFFERS_H
#define CULVERT_SLOT_BUFFERS_H

#include "../abi.h"
#include "../kernel.h"
#include "outstanding.h"
#include "tell.h"

/* However much small segments cost, so much is announced. */
#define WINDOW_FLOOR (64 * 1024)

/* include/uapi/linux/tcp.h and asm-generic/socket.h, include/net/sock.h */
#define TCP_WINDOW_CLAMP 10
#define SOL_SOCKET 1
#define SO_SNDBUF 7
#define SO_RCVBUF 8
#define SOCK_SNDBUF_LOCK 1
#define SOCK_RCVBUF_LOCK 2

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
 * A source that is held back with nothing in its receive queue must not announce a closed window: what would open it again is
 * that something is taken from the queue. While its lock is held for a kick, what has passed through the socket backlog is
 * taken off the window (see `is_flooded`), and over loopback, where a segment is 64 KiB, the window closes when half of a
 * small buffer has. So the buffer grows by that before the announcement (bpf_skops_hdr_opt_len comes before tcp_select_window).
 * User space sizes it anew when it hears of the pause, or gives it back the size that its listener was given (`size_buffers`).
 */
static __always_inline void make_room(struct bpf_sock_ops *ops, struct tcp_sock *self, struct flow *flow)
{
	__u32 present = self->inet_conn.icsk_inet.sk.sk_rcvbuf;
	__u32 passed = self->inet_conn.icsk_inet.sk.sk_backlog.len;
	__u32 bytes = (present + passed) / 2;

	if (!(flow->flags & FLOW_KICKED) || passed <= present / 2)
		return;
	if (bytes > flow->settable_bytes)
		bytes = flow->settable_bytes;
	if (bytes > flow->window_bytes)
		bytes = flow->window_bytes;
	if (bytes > present / 2)
		bpf_setsockopt(ops, SOL_SOCKET, SO_RCVBUF, &bytes, sizeof(bytes));
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
 * The send buffer of a target has to take what may be outstanding: where it is full, the kernel thread sleeps for a tick
 * (sk_psock_backlog). TCP lets it grow with the congestion window, which is small at the beginning, and user space sizes it at
 * the first pause, which a stream that is smaller than the backlog never has: 2 MB over an Ethernet would take 18 ms
 * instead of 3. So it grows as soon as more than a burst is outstanding. What is beyond the host's limit only the master can
 * give: its worker is told, once. A buffer whose size was given is left alone.
 */
static __always_inline void widen_target(struct bpf_sock_ops *ops, struct tcp_sock *self, struct flow *flow, __u32 other)
{
	struct sock *sk = &self->inet_conn.icsk_inet.sk;
	__u32 wanted = flow->window_bytes;
	__u32 settable = flow->settable_bytes;
	__u32 present = (__u32)sk->sk_sndbuf / 2;
	__s32 outstanding;
	__u32 bytes = wanted < settable ? wanted : settable;

	if (present >= wanted || (flow->flags & (FLOW_STARTED | FLOW_NARROW)) != FLOW_STARTED)
		return;
	outstanding = outstanding_bytes(flow, self);
	if (bytes > present && !(BPF_CORE_READ_BITFIELD(sk, sk_userlocks) & SOCK_SNDBUF_LOCK)) {
		if (outstanding > (__s32)(present / 4))
			bpf_setsockopt(ops, SOL_SOCKET, SO_SNDBUF, &bytes, sizeof(bytes));
	} else if (settable < wanted && outstanding > (__s32)(present / 2)) {
		__sync_fetch_and_or(&flow->flags, FLOW_NARROW);
		tell(flow, other, EVENT_NARROW);
	}
}

#endif
