/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * The few fields of kernel structures that the programs read. CO-RE relocates them to the running
 * kernel's layout, so neither order nor completeness matters.
 */
#ifndef CULVERT_KERNEL_H
#define CULVERT_KERNEL_H

#pragma clang attribute push(__attribute__((preserve_access_index)), apply_to = record)

struct sk_buff {
	char cb[48];
};

struct sk_buff_head {
	__u32 qlen;
};

struct sock {
	struct sk_buff_head sk_receive_queue;
	struct {
		struct {
			int counter;
		} rmem_alloc;
		int len;
	} sk_backlog;
	int sk_rcvbuf;
	int sk_sndbuf;
	__u8 sk_userlocks : 4;
	int sk_wmem_queued;
	void *sk_user_data;
};

struct sk_psock {
	struct sk_buff_head ingress_skb;
};

struct inet_sock {
	struct sock sk;
};

struct inet_connection_sock {
	struct inet_sock icsk_inet;
};

struct tcp_options_received {
	__u8 num_sacks;
};

struct tcp_sock {
	struct inet_connection_sock inet_conn;
	__u32 copied_seq;
	__u32 rcv_nxt;
	__u32 rcv_wup;
	__u32 rcv_wnd;
	__u32 window_clamp;
	__u64 bytes_acked;
	struct tcp_options_received rx_opt;
};

#pragma clang attribute pop

#endif
