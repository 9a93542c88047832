// AXI4-Lite registers in the layout that XRT expects of a kernel under ap_ctrl_hs.
//   0x00 control  bit 0 start, 1 done (cleared by reading), 2 idle, 3 ready, 7 auto-restart
//   0x04 global interrupt enable   0x08 interrupt enable   0x0c interrupt status (a one toggles)
//   0x10 keys   0x1c query   0x28 out   (64 bits each)
//   0x34 first  0x3c n_tokens  0x44 k  0x4c heads  0x54 mode  0x5c key_stride  0x64 out_stride
//   0x6c status (read only)
module cec_control (
    input  wire        clk,
    input  wire        rst,
    input  wire        s_awvalid,
    output wire        s_awready,
    input  wire [7:0]  s_awaddr,
    input  wire        s_wvalid,
    output wire        s_wready,
    input  wire [31:0] s_wdata,
    input  wire [3:0]  s_wstrb,
    output reg         s_bvalid,
    input  wire        s_bready,
    input  wire        s_arvalid,
    output wire        s_arready,
    input  wire [7:0]  s_araddr,
    output reg         s_rvalid,
    input  wire        s_rready,
    output reg  [31:0] s_rdata,
    output wire        interrupt,
    output reg         ap_start,
    input  wire        ap_done,     // one cycle; also ready
    input  wire        ap_idle,
    input  wire [31:0] status,
    output wire [63:0] keys,
    output wire [63:0] query,
    output wire [63:0] out,
    output wire [31:0] first,
    output wire [31:0] n_tokens,
    output wire [31:0] k,
    output wire [31:0] heads,
    output wire [31:0] mode,
    output wire [31:0] key_stride,
    output wire [31:0] out_stride
);
    localparam ARGS = 13;           // words; word i of the table below
    reg [31:0] arg [0:ARGS-1];
    reg done, restart, global_enable;
    reg [1:0] enable, pending;

    // Arguments of 64 bits take 12 bytes each from 0x10 on, arguments of 32 bits 8 bytes each from 0x34 on.
    function [3:0] index(input [7:0] a);
        case (a & 8'hfc)
            8'h10: index = 0;
            8'h14: index = 1;
            8'h1c: index = 2;
            8'h20: index = 3;
            8'h28: index = 4;
            8'h2c: index = 5;
            8'h34: index = 6;
            8'h3c: index = 7;
            8'h44: index = 8;
            8'h4c: index = 9;
            8'h54: index = 10;
            8'h5c: index = 11;
            8'h64: index = 12;
            default: index = 15;
        endcase
    endfunction

    assign keys = {arg[1], arg[0]};
    assign query = {arg[3], arg[2]};
    assign out = {arg[5], arg[4]};
    assign first = arg[6];
    assign n_tokens = arg[7];
    assign k = arg[8];
    assign heads = arg[9];
    assign mode = arg[10];
    assign key_stride = arg[11];
    assign out_stride = arg[12];
    assign interrupt = global_enable && (pending != 0);

    // A write is taken when both its address and its data are there, and the last response is gone.
    wire do_write = s_awvalid && s_wvalid && !s_bvalid;
    assign s_awready = do_write;
    assign s_wready = do_write;
    wire do_read = s_arvalid && !s_rvalid;
    assign s_arready = do_read;
    wire [3:0] windex = index(s_awaddr), rindex = index(s_araddr);
    wire low = s_wstrb[0];
    integer i, b;
    always @(posedge clk) begin
        if (do_write) s_bvalid <= 1;
        else if (s_bready) s_bvalid <= 0;
        if (do_read) begin
            s_rvalid <= 1;
            case (s_araddr & 8'hfc)
                8'h00: s_rdata <= {24'd0, restart, 3'd0, done, ap_idle, done, ap_start};
                8'h04: s_rdata <= global_enable;
                8'h08: s_rdata <= enable;
                8'h0c: s_rdata <= pending;
                8'h6c: s_rdata <= status;
                default: s_rdata <= rindex < ARGS ? arg[rindex] : 32'd0;
            endcase
        end else if (s_rready) s_rvalid <= 0;

        if (do_read && (s_araddr & 8'hfc) == 0) done <= 0;
        if (ap_done) begin
            done <= 1;
            ap_start <= restart;
            pending <= pending | enable;
        end
        for (i = 0; i < ARGS; i = i + 1)
            for (b = 0; b < 4; b = b + 1)
                if (do_write && windex == i && s_wstrb[b]) arg[i][b*8 +: 8] <= s_wdata[b*8 +: 8];
        if (do_write && low) case (s_awaddr & 8'hfc)
            8'h00: begin
                if (s_wdata[0]) ap_start <= 1;
                restart <= s_wdata[7];
            end
            8'h04: global_enable <= s_wdata[0];
            8'h08: enable <= s_wdata[1:0];
            8'h0c: pending <= pending ^ s_wdata[1:0];
            default: ;
        endcase
        if (rst) begin
            s_bvalid <= 0;
            s_rvalid <= 0;
            ap_start <= 0;
            done <= 0;
            restart <= 0;
            global_enable <= 0;
            enable <= 0;
            pending <= 0;
        end
    end
endmodule
